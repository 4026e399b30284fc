"""What a reader does with the page, by mouse, keyboard and touch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moxe.cli import main
from moxe.data.tokenizer import train_tokenizer
from moxe.experiments.exploration import explore
from moxe.observability.explorer.page import write_page
from tests.browser import PHONE
from tests.models.tiny import tiny_model
from tests.observability.explorer.conftest import TEXT, Made, Open


@pytest.fixture
def page(visiting: Open, made: Made) -> Iterator[Any]:
    with visiting(made.path) as visited:
        yield visited.page


def details(page: Any) -> str:
    return page.locator('[data-part="token"]').first.inner_text()


def focused(page: Any) -> int:
    return int(page.evaluate("document.activeElement.dataset.token ?? -1"))


def selected(page: Any) -> list[str]:
    return page.locator('[data-token][aria-selected="true"]').evaluate_all("all => all.map(one => one.dataset.token)")


def lit(page: Any) -> list[int]:
    return page.locator("[data-token].lit").evaluate_all("all => all.map(one => Number(one.dataset.token))")


def tokens_of(made: Made, layer: int, expert: int) -> list[int]:
    return (made.exploration.layers[layer].experts == expert).any(1).nonzero()[0].tolist()


def cell(page: Any, layer: int, name: str) -> Any:
    return page.get_by_role("button", name=f"layer {layer}, expert {name}:")


def hover(page: Any, token: Any) -> None:
    token.hover()


def touch(page: Any, token: Any) -> None:
    token.tap()


def click(page: Any, token: Any) -> None:
    token.click()


def tab_and_arrows(page: Any, token: Any) -> None:
    page.locator("#clear").focus()
    page.keyboard.press("Tab")  # into the text
    assert focused(page) == 0
    for _ in range(12):
        page.keyboard.press("ArrowRight")


def test_mouse_keyboard_and_touch_give_the_same_details(visiting: Open, made: Made):
    seen = []
    for act in (hover, click, touch, tab_and_arrows):
        with visiting(made.path, has_touch=act is touch) as visited:
            assert "Point at a token" in details(visited.page)
            act(visited.page, visited.page.locator('[data-token="12"]'))
            assert selected(visited.page) == ["12"]
            seen.append(details(visited.page))
    assert "13 of" in seen[0]
    assert len(set(seen)) == 1


def test_the_details_follow_the_keys_also_where_the_mouse_rests_on_the_text(page: Any):
    page.locator('[data-token="5"]').click()
    page.keyboard.press("ArrowRight")
    assert "7 of" in details(page)
    page.locator('[data-token="20"]').hover()
    assert "21 of" in details(page)
    page.get_by_role("heading", level=1).hover()
    assert "7 of" in details(page)  # again the token that has the focus


def test_arrow_keys_home_and_end_go_through_the_text(page: Any, made: Made):
    last = len(made.exploration.pieces) - 1
    page.locator('[data-token="0"]').focus()
    for key, expected in [
        ("ArrowLeft", 0),
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", last),
        ("ArrowRight", last),
        ("ArrowLeft", last - 1),
        ("Home", 0),
        ("ArrowUp", 0),
        ("x", 0),
        ("Control+ArrowRight", 0),
    ]:
        page.keyboard.press(key)
        assert focused(page) == expected, key
    assert page.locator('[data-token][tabindex="0"]').count() == 1


def test_arrow_keys_go_to_the_nearest_token_of_the_next_line(page: Any):
    boxes = page.locator("[data-token]").evaluate_all(
        "all => all.map(one => one.getClientRects()[0]).map(one => [one.left, Math.round(one.top)])"
    )
    lines = sorted({top for _, top in boxes})
    assert len(lines) > 4
    here = next(index for index, (left, top) in enumerate(boxes) if top == lines[1] and left > 200)

    def nearest(line: int) -> int:
        return min(
            (index for index, (_, top) in enumerate(boxes) if top == lines[line]),
            key=lambda index: abs(boxes[index][0] - boxes[here][0]),
        )

    expected = [nearest(0), nearest(2)]
    for key, index in zip(["ArrowUp", "ArrowDown"], expected, strict=True):
        page.locator(f'[data-token="{here}"]').focus()
        page.keyboard.press(key)
        assert focused(page) == index


def test_the_text_and_the_load_are_one_tab_stop_each(page: Any):
    stops = []
    page.locator("#measure").focus()
    for _ in range(12):
        stops.append(
            page.evaluate(
                "(one => one.id || (one.closest('[data-part]')?.dataset.part ?? one.tagName))(document.activeElement)"
            )
        )
        page.keyboard.press("Tab")
    assert stops == [
        *["measure", "layer", "clear", "text", "token", "load", "experts-layer"],
        *["experts"] * 4,
        *stops[11:],
    ]
    assert not {"text", "load", "experts"} & set(stops[11:])


def test_the_focus_is_seen(page: Any):
    page.locator("#layer").focus()
    for _ in range(6):
        page.keyboard.press("Tab")
        is_seen = """one => {
          const style = getComputedStyle(one);
          const focus = getComputedStyle(document.documentElement).getPropertyValue("--focus");
          const probe = Object.assign(document.createElement("i"), { style: `color: ${focus}` });
          document.body.append(probe);
          const wanted = getComputedStyle(probe).color;
          probe.remove();
          const isOutlined = style.outlineStyle === "solid" && parseFloat(style.outlineWidth) >= 2;
          return (isOutlined && style.outlineColor === wanted)
            || (style.stroke === wanted && parseFloat(style.strokeWidth) >= 2);
        }"""
        name = page.evaluate("document.activeElement.outerHTML.slice(0, 80)")
        assert page.evaluate(f"({is_seen})(document.activeElement)"), name


def test_roles_and_names_are_those_that_assistive_technology_knows(page: Any, made: Made):
    pieces = made.exploration.pieces
    options = page.get_by_role("listbox", name="the text, token by token").get_by_role("option")
    assert options.count() == len(pieces)
    assert page.get_by_role("option", name=re.compile(r"^the, difficulty d 0\.\d{2,4}$")).count() > 3
    assert page.get_by_role("option", name=re.compile(r"^line break, ")).count() == TEXT.count("\n")
    assert page.get_by_role("option", name=re.compile(r"^part of a character, ")).count() == pieces.count("") > 0
    assert page.get_by_role("combobox", name="Shade by").get_attribute("id") == "measure"
    assert page.get_by_role("combobox", name="Layer", exact=True).get_attribute("id") == "layer"
    assert page.get_by_role("combobox", name="Layer of the experts").count() == 1
    for name in ("M0", "M1", "S2", "S3"):
        assert page.get_by_role("button", name=f"Light up the tokens of {name}, layer 0", pressed=False).count() == 1
    assert cell(page, 1, "S3").get_attribute("aria-pressed") == "false"
    charts = page.get_by_role("img").evaluate_all("all => all.map(one => one.ariaLabel)")
    assert len(charts) == 1 + 2 * 3
    assert all(charts)
    assert page.get_by_role("complementary", name="the chosen token").count() == 1
    assert page.get_by_role("region", name="tiny").count() == 1
    unnamed = page.locator("button, select, a[href], input").evaluate_all(
        "all => all.filter(one => !(one.ariaLabel || one.innerText.trim() || one.labels?.length))"
    )
    assert unnamed == []


def test_what_a_screen_reader_is_told_stays_one_element_and_is_of_the_focus_alone(page: Any, made: Made):
    live = page.get_by_role("status").element_handle()
    for index in (3, 4):
        page.locator(f'[data-token="{index}"]').focus()
        of_layer = r"layer {}: difficulty 0\.\d\d, odds [\d.]+, [MS]\d \d+%, [MS]\d \d+%; "
        assert re.search(
            "".join(of_layer.format(layer) for layer in range(3)) + "likeliest next: .", live.text_content()
        )
        assert live.evaluate("one => one.isConnected")
    told = live.text_content()
    page.locator('[data-token="9"]').hover()
    assert "10 of" in details(page)
    assert live.text_content() == told
    cell(page, 1, "S2").click()
    assert (
        live.text_content() == f"S2 of layer 1: {len(tokens_of(made, 1, 2))} of {len(made.exploration.pieces)} tokens"
    )


def test_a_button_goes_to_the_first_token_that_is_lit(page: Any, made: Made):
    assert page.locator("#first").is_hidden()
    cell(page, 1, "S2").click()
    page.locator("#first").click()
    assert focused(page) == tokens_of(made, 1, 2)[0]
    page.keyboard.press("Escape")
    assert page.locator("#first").is_hidden()


def test_without_a_token_that_was_chosen_the_details_stay_when_the_mouse_leaves(page: Any):
    page.locator('[data-token="20"]').hover()
    page.get_by_role("heading", level=1).hover()
    assert "21 of" in details(page)


@pytest.mark.parametrize("part", ["text", "load"])
def test_arrow_keys_at_an_end_do_not_move_the_page(page: Any, part: str):
    page.set_viewport_size({"width": 900, "height": 500})
    page.locator(f'[data-part="{part}"] [tabindex]').last.focus()
    before = page.evaluate("scrollY")
    for key in ("ArrowDown", "ArrowRight") * 3:
        page.keyboard.press(key)
    assert page.evaluate("scrollY") == before


@pytest.mark.parametrize("way", ["button", "click", "Enter", "Space"])
def test_an_expert_lights_up_the_tokens_it_received_and_no_others(page: Any, made: Made, way: str):
    layer, expert = 1, 2
    if way == "button":
        page.locator('[data-part="experts-layer"]').select_option(str(layer))

        def choose() -> None:
            page.locator(f'[data-expert="{expert}"] button').click()
    elif way == "click":

        def choose() -> None:
            cell(page, layer, "S2").click()
    else:

        def choose() -> None:
            cell(page, layer, "S2").focus()
            page.keyboard.press(way)

    ends: list[Callable[[], None]] = [
        choose,
        lambda: page.keyboard.press("Escape"),
        lambda: page.locator("#clear").click(),
    ]
    assert 0 < len(tokens_of(made, layer, expert)) < len(made.exploration.pieces)
    for clear in ends:
        assert lit(page) == []
        assert page.locator("#clear").is_disabled()
        choose()
        assert lit(page) == tokens_of(made, layer, expert)
        assert page.locator("#clear").is_enabled()
        assert cell(page, layer, "S2").get_attribute("aria-pressed") == "true"
        assert page.locator(f'[data-expert="{expert}"] button').get_attribute("aria-pressed") == "true"
        assert page.locator('[aria-pressed="true"]').count() == 2
        clear()
    assert lit(page) == []
    assert page.locator('[aria-pressed="true"]').count() == 0


def test_lit_tokens_stand_out_and_stay_lit_when_the_shades_change(page: Any, made: Made):
    cell(page, 0, "M1").click()
    expected = tokens_of(made, 0, 1)
    for measure in ("loss", "group_m", "difficulty"):
        page.locator("#measure").select_option(measure)
        assert lit(page) == expected
    marks = page.locator("[data-token]").evaluate_all("all => all.map(one => getComputedStyle(one).textDecorationLine)")
    assert [index for index, mark in enumerate(marks) if mark == "underline"] == expected
    shaded = page.locator("[data-token]").evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    assert {index for index, colour in enumerate(shaded) if colour != "rgba(0, 0, 0, 0)"} <= set(expected)


def test_the_focus_stays_on_the_button_of_the_expert_that_it_lights_up(page: Any):
    page.locator('[data-expert="3"] button').focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('[data-expert]').dataset.expert") == "3"


def test_arrow_keys_go_through_the_load(page: Any):
    cell(page, 0, "M0").focus()
    for key, name in [
        ("ArrowUp", "layer 0, expert M0"),
        ("ArrowLeft", "layer 0, expert M0"),
        ("ArrowRight", "layer 0, expert M1"),
        ("ArrowRight", "layer 0, expert S2"),
        ("ArrowDown", "layer 1, expert S2"),
        ("ArrowRight", "layer 1, expert S3"),
        ("ArrowRight", "layer 1, expert S3"),
        ("ArrowDown", "layer 2, expert S3"),
        ("ArrowDown", "layer 2, expert S3"),
        ("ArrowLeft", "layer 2, expert S2"),
        ("ArrowUp", "layer 1, expert S2"),
    ]:
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(name + ":"), key


def test_the_chosen_layer_is_that_of_the_experts_and_of_the_details_too(page: Any):
    page.locator('[data-token="3"]').focus()
    assert page.locator("tr.chosen").count() == 0  # the mean of all
    page.locator("#layer").select_option("2")
    assert page.locator("tr.chosen th").inner_text() == "2"
    assert page.locator('[data-part="experts-layer"]').input_value() == "2"
    page.locator("#layer").select_option("mean")
    assert page.locator("tr.chosen").count() == 0
    cell(page, 1, "M0").click()
    assert page.locator('[data-part="experts-layer"]').input_value() == "1"


def test_a_standard_router_has_no_difficulty_to_shade_by(visiting: Open, explored, tmp_path: Path):
    write_page([explored(router_kind="standard")[1]], tmp_path / "page.html", text_name="a text")
    with visiting(tmp_path / "page.html") as visited:
        measure = visited.page.locator("#measure")
        assert measure.input_value() == "loss"
        options = measure.locator("option").evaluate_all("all => all.map(one => [one.value, one.disabled])")
        assert [name for name, is_disabled in options if is_disabled] == ["difficulty"]
        assert len(options) == 6
        assert visited.page.get_by_text("has no difficulty, so there is no slope to see").is_visible()
        visited.page.locator('[data-token="3"]').focus()
        header = visited.page.locator('[data-part="token"] thead').first.inner_text().strip().split("\t")
        assert header == ["layer", "odds", "experts and weights"]


def test_in_a_pair_a_token_is_chosen_in_both_and_an_expert_in_its_own(visiting: Open, made_pair):
    explorations, path = made_pair
    with visiting(path) as visited:
        page = visited.page
        views = page.locator("section.model")
        assert views.locator("h2").all_inner_texts() == ["first", "second"]
        for source in (0, 1):
            views.nth(source).locator(f'[data-token="{7 + source}"]').hover()
            assert selected(page) == [str(7 + source)] * 2
            headings = page.locator('[data-part="token"] h3').all_inner_texts()
            assert len(headings) == 2
            assert len(set(headings)) == 1
        assert [view.get_by_role("button", name="layer 2, expert").count() for view in views.all()] == [4, 0]
        views.nth(1).get_by_role("button", name="layer 1, expert S5:").click()
        assert views.nth(0).locator(".lit").count() == 0
        expected = (explorations[1].layers[1].experts == 5).any(1).sum()
        assert views.nth(1).locator("[data-token].lit").count() == expected > 0
        assert page.get_by_text("These experts keep no memory.").count() == 1


def test_a_pair_says_in_what_the_models_differ_and_what_one_of_them_lacks(visiting: Open, made_pair):
    with visiting(made_pair[1]) as visited:
        page = visited.page
        views = page.locator("section.model")
        shown = [
            dict(zip(view.locator("dt").all_inner_texts(), view.locator("dd").all_inner_texts(), strict=True))
            for view in views.locator('[data-part="differences"]').all()
        ]
        assert shown == [
            {"num_hidden_layers": "3", "num_experts": "4", "expert_kind": "xlstm", "router_kind": "entropy"},
            {"num_hidden_layers": "2", "num_experts": "6", "expert_kind": "ffn", "router_kind": "standard"},
        ]
        assert page.locator("#measure").input_value() == "difficulty"
        titles = page.locator('[data-part="key-title"]')
        assert titles.nth(1).inner_text() == "The standard router of this model has no difficulty to shade by."
        page.locator("#measure").select_option("entropy")
        page.locator("#layer").select_option("2")
        assert "layer 2" in titles.nth(0).inner_text()
        assert "the mean of all layers" in titles.nth(1).inner_text()


def test_models_with_different_tokenizers_show_the_same_place_of_the_text(visiting: Open, tokenizer, tmp_path: Path):
    bytes_alone = train_tokenizer([], vocab_size=258)
    explorations = [
        explore(tiny_model(vocab_size=300), TEXT, of_model, name=name)
        for name, of_model in (("merged", tokenizer), ("bytes", bytes_alone))
    ]
    write_page(explorations, tmp_path / "page.html", text_name="a text")
    with visiting(tmp_path / "page.html") as visited:
        views = visited.page.locator("section.model")
        merged, of_bytes = (one.pieces for one in explorations)
        start = len("".join(merged[:30]))
        views.nth(0).locator('[data-token="30"]').focus()
        assert int(selected(visited.page)[1]) == len(TEXT[:start].encode())
        views.nth(1).locator(f'[data-token="{start + 1}"]').focus()
        found = int(selected(visited.page)[0])
        assert len("".join(merged[:found])) <= start + 1 < len("".join(merged[: found + 1]))
        assert of_bytes[start + 1] == TEXT[start + 1]
        part = of_bytes.index("")  # the second byte of a character belongs to the same place as the first
        views.nth(1).locator(f'[data-token="{part}"]').focus()
        found = int(selected(visited.page)[0])
        place = len("".join(of_bytes[: part - 1]))
        assert len("".join(merged[:found])) <= place < len("".join(merged[: found + 1]))


def test_a_text_of_one_token_has_a_page(visiting: Open, explored, tmp_path: Path):
    write_page([explored(text="a")[1]], tmp_path / "page.html", text_name="the prompt")
    with visiting(tmp_path / "page.html") as visited:
        visited.page.locator("[data-token]").click()
        assert "Here the text ends." in details(visited.page)
        assert visited.page.locator(".warning").count() == 0
        assert visited.page.get_by_text("too short a text to say").count() == 3
        assert visited.page.get_by_text(re.compile(r"\b1 tokens")).count() == 0


def test_pages_of_the_command_open_for_one_checkpoint_and_for_two(visiting: Open, tokenizer, tmp_path: Path, capsys):
    folders = [tmp_path / name for name in ("one", "other")]
    for seed, folder in enumerate(folders):
        tiny_model(seed=seed, vocab_size=300).float().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for chosen in (folders[:1], folders):
        out = tmp_path / f"{len(chosen)}.html"
        assert main(["explore", *map(str, chosen), "--prompt", "the old man", "--out", str(out)]) == 0
        assert str(out) in capsys.readouterr().out
        with visiting(out, PHONE) as visited:
            assert visited.page.locator("h2").all_inner_texts() == list(map(str, chosen))
            texts = visited.page.locator('[data-part="text"]').all_text_contents()
            assert texts == ["the old man"] * len(chosen)


def test_another_measure_leaves_the_layer_of_the_experts_where_it_is(page: Any):
    page.locator("#layer").select_option("1")
    page.locator('[data-part="experts-layer"]').select_option("2")
    page.locator("#measure").select_option("entropy")
    assert page.locator('[data-part="experts-layer"]').input_value() == "2"
    assert ", layer 2 " in page.locator(".card h4").first.inner_text()


def test_two_models_show_the_experts_of_the_same_layer_and_the_same_place_of_the_text(
    visiting: Open, made_pair: tuple[Any, Path]
):
    with visiting(made_pair[1]) as visited:
        page = visited.page
        first, second = page.locator(".model").all()
        first.locator('svg [role="button"]').nth(5).click()
        titles = [view.locator(".card h4").first.inner_text() for view in (first, second)]
        assert [title.split(" (")[0] for title in titles] == ["M0, layer 1"] * 2
        texts = [view.locator('[data-part="text"]') for view in (first, second)]
        for text in texts:
            text.evaluate("one => { one.style.maxHeight = '5rem'; one.scrollTop = 0 }")
        texts[0].locator("[data-token]").nth(-20).focus()
        selected = texts[1].locator('[aria-selected="true"]')
        box, frame = selected.bounding_box(), texts[1].bounding_box()
        assert frame["y"] - 1 <= box["y"] <= box["y"] + box["height"] <= frame["y"] + frame["height"] + 1


def test_two_models_share_the_colours_of_the_load(visiting: Open, made_pair: tuple[Any, Path]):
    with visiting(made_pair[1]) as visited:
        fill = "all => all.map(one => [one.ariaLabel.match(/: (.+?)%/)[1], getComputedStyle(one).fill])"
        fills = visited.page.locator('svg [role="button"]').evaluate_all(fill)
        by_load: dict[str, set[str]] = {}
        for load, colour in fills:
            by_load.setdefault(load, set()).add(colour)
        most = max(by_load, key=float)
        brightest = [colour for load, colours in by_load.items() for colour in colours if load != most]
        assert not by_load[most] & set(brightest)  # the fullest cell of the page, and no other, is the darkest


def test_the_words_of_a_page_without_difficulty_do_not_speak_of_it(visiting: Open, explored, tmp_path: Path):
    write_page(
        [explored("standard", router_kind="standard", expert_kind="slstm")[1]], tmp_path / "page.html", text_name="a"
    )
    with visiting(tmp_path / "page.html") as visited:
        assert "how hard" not in visited.page.locator("header").inner_text()
        assert "γ" not in visited.page.locator('[data-part="facts"]').inner_text()
        assert "mLSTM" not in visited.page.locator("#measure").text_content()


def test_a_narrower_window_has_narrower_charts(page: Any):
    def widest() -> float:
        return page.evaluate(
            "Math.max(...[...document.querySelectorAll('[data-part=memory] svg')].map(one => one.clientWidth))"
        )

    before = widest()
    page.set_viewport_size({"width": 380, "height": 800})
    page.wait_for_timeout(200)
    assert widest() < before
    assert widest() <= 380


def test_the_focus_is_not_lost_where_what_has_it_is_drawn_anew_or_goes(page: Any):
    cell(page, 1, "S2").focus()
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("document.activeElement.ariaLabel").startswith("layer 1, expert S2")
    page.keyboard.press("Enter")
    page.locator("#first").focus()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "clear"


def test_the_chosen_cell_and_the_focused_cell_are_told_apart(page: Any):
    cell(page, 0, "S2").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    chosen, focused_one = (
        cell(page, 0, name).evaluate("one => [getComputedStyle(one).stroke, getComputedStyle(one).strokeDasharray]")
        for name in ("S2", "S3")
    )
    assert chosen[0] != focused_one[0]
    assert chosen[1] != focused_one[1]
