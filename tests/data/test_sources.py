import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moxe.data.sources import find_files, find_source, read_documents, read_places
from moxe.errors import PassingError, UserError
from tests.data.conftest import HUB_TEXTS, write_parquet


def read(source, *, text_field="text", document_separator="<|endoftext|>", **options):
    return list(read_documents(str(source), text_field=text_field, document_separator=document_separator, **options))


def test_a_txt_file_is_cut_at_separator_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\nstill\n\n<|endoftext|>\ntwo <|endoftext|> two\n  <|endoftext|> \n\n<|endoftext|>\nthree")
    assert read(path) == ["one\n\nstill", "two <|endoftext|> two", "three"]


def test_a_txt_file_without_separator_line_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\none\n\n  two\n")
    assert read(path) == ["one\n\n  two"]


def test_an_empty_separator_cuts_at_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\nmore\n\n\ntwo\n  \nthree\n")
    assert read(path, document_separator="") == ["one\nmore", "two", "three"]


def test_windows_line_breaks_and_a_byte_order_mark_are_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n<|endoftext|>\r\nthree\r\n".encode())
    assert read(path) == ["one\ntwo", "three"]


def test_jsonl_texts_are_read_verbatim_and_blank_ones_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": " one\n\n<|endoftext|>\n"}, {"text": "  "}, {"text": "zwei ✓", "id": 3}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read(path) == [" one\n\n<|endoftext|>\n", "zwei ✓"]


def test_the_text_field_can_have_another_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1, "content": "one"}\n')
    write_parquet(tmp_path / "b.parquet", ["two"], column="content")
    assert read(tmp_path, text_field="content") == ["one", "two"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_columns_of_any_kind_of_text_are_read(tmp_path, kind):
    texts = [f"text {i % 3}" for i in range(2500)]
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), tmp_path / "a.parquet", row_group_size=1000)
    assert read(tmp_path / "a.parquet") == texts


def test_a_parquet_file_that_is_damaged_within_is_bad_data(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [f"text {i} " * 20 for i in range(3000)])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet' is no parquet file that can be read: .*[^.]\.$") as error:
        read(path)
    assert not isinstance(error.value, PassingError)


def test_a_disk_that_fails_under_a_parquet_file_may_pass(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", ["text"])
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "broken")))
    with pytest.raises(PassingError, match=r"a\.parquet' cannot be read: broken\.$"):
        read(tmp_path / "a.parquet")


def test_the_folder_of_a_user_who_is_not_there_does_not_exist():
    with pytest.raises(UserError, match="'~nobody-of-this-name' does not exist"):
        find_files("~nobody-of-this-name")


def test_a_folder_is_read_with_its_subfolders_in_the_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "a.jsonl").write_text('{"text": "two"}')
    (tmp_path / "a.txt").write_text("one")
    write_parquet(tmp_path / "c.parquet", ["three"])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden" / "a.txt").write_text("hidden")
    assert read(tmp_path) == ["one", "two", "three"]


def test_a_glob_is_read_in_the_order_of_paths(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "other.jsonl"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "sub/c.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    assert read(tmp_path / "a[1].txt") == ["one"]


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    assert read("~/a.txt") == ["one"]


def test_reading_is_lazy(tmp_path):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    documents = read_documents(str(tmp_path), text_field="text", document_separator="<|endoftext|>")
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(UserError, match=r"b\.txt"):
        next(documents)


def test_progress_adds_up_to_the_sizes_of_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("ä\n<|endoftext|>\n\n<|endoftext|>\ntwo\n\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": " "}\n')
    write_parquet(tmp_path / "c.parquet", ["four", "five", "six"])
    steps: list[int] = []
    read(tmp_path, advance=steps.append)
    assert sum(steps) == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("source", ["nothing.txt", "folder/nothing.jsonl", "./folder", "../data/x", "name", "builtn"])
def test_a_missing_path_is_refused_at_once_with_the_choices(source):
    with pytest.raises(UserError, match="does not exist") as error:
        read_documents(source, text_field="text", document_separator="")
    assert repr(source) in str(error.value)
    assert '"builtin", a file, folder or glob of .txt, .jsonl, .parquet' in str(error.value)


def test_a_folder_or_glob_without_matching_files_is_refused(tmp_path):
    (tmp_path / "a.md").write_text("text")
    for source in (tmp_path, tmp_path / "*", tmp_path / "*.txt", tmp_path / "a.md"):
        with pytest.raises(UserError, match=r"holds no file that can be read, which end with \.txt, \.jsonl"):
            read(source)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", ""), ("a.txt", " \n\n"), ("a.txt", "<|endoftext|>\n"), ("a.jsonl", ""), ("a.jsonl", '{"text": ""}\n')],
)
def test_a_file_without_text_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}' is empty"):
        read(tmp_path)


def test_a_parquet_file_without_rows_is_refused_by_name(tmp_path):
    write_parquet(tmp_path / "a.parquet", pa.array([], pa.string()))
    with pytest.raises(UserError, match=r"a\.parquet' is empty"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "before"), [("a.txt", "first line ä\nsecond "), ("a.jsonl", '{"text": "ä"}\n{"text": "')]
)
def test_invalid_utf8_is_refused_with_file_and_byte_offset(tmp_path, name, before):
    (tmp_path / name).write_bytes(before.encode() + b"\xe4\n")
    with pytest.raises(UserError, match=f"{name}' is no valid UTF-8: byte 0xe4 at offset {len(before.encode())};"):
        read(tmp_path / name)


def test_utf8_that_ends_in_the_middle_of_a_character_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("ab\nä".encode()[:-1])
    with pytest.raises(UserError, match="offset 3;"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "x", "id": 1}', "Line 3 of .* has no field 'text'; its fields: 'content', 'id'"),
        ("{}", "Line 3 of .* has no field 'text'; its fields: none"),
        ('{"text": null}', "Line 3 of .* has in field 'text' null, where text is expected"),
        ('{"text": ["a"]}', "Line 3 of .* has in field 'text' a list, where text is expected"),
        ('{"text": "a\\ud800"}', "Line 3 of .* has in field 'text' an unpaired surrogate at character 1"),
        ('{"text": "a"', "Line 3 of .* is no JSON"),
        ("plain text", "Line 3 of .* is no JSON"),
        ("[" * 100_000, "Line 3 of .* is no JSON"),
        ('"text"', "Line 3 of .* is no JSON object but a str"),
    ],
)
def test_a_jsonl_row_without_text_is_refused_with_its_line_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.jsonl")


def test_a_parquet_file_without_the_column_is_refused_with_its_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one"], column="content")
    with pytest.raises(UserError, match=r"a\.parquet' has no column 'text'; its columns: 'id', 'content'"):
        read(tmp_path)


def test_a_parquet_row_without_text_is_refused_with_its_number(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", None])
    with pytest.raises(UserError, match=r"Row 2 of .*a\.parquet' has in column 'text' null"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"Row 1 of .*a\.parquet' has in column 'id' a int"):
        read(tmp_path, text_field="id")


def test_a_parquet_file_with_invalid_utf8_is_refused_by_name(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"column 'text' of .*a\.parquet' is no valid UTF-8"):
        read(tmp_path)


def test_a_file_that_is_no_parquet_is_refused_by_name(tmp_path):
    (tmp_path / "a.parquet").write_text("just text")
    with pytest.raises(UserError, match=r"a\.parquet' is no parquet file"):
        read(tmp_path)


def test_a_file_that_may_not_be_read_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UserError, match=r"a\.txt' cannot be read: Permission denied"):
        read(tmp_path)


def test_only_names_with_an_owner_are_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_source("owner/name").is_hub
    assert not find_source("builtin").is_hub
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.txt").write_text("here")
    assert not find_source("owner/name").is_hub
    assert [path.name for path in find_files("owner/name") or []] == ["a.txt"]


def test_a_hub_data_set_is_streamed_in_order(hub):
    assert read("owner/name") == HUB_TEXTS
    assert read("owner/name", split="validation") == ["a text to validate on", "another one"]


def test_a_hub_data_set_that_does_not_exist_is_refused(hub):
    with pytest.raises(UserError, match=r"no file or folder 'owner/other' here.*doesn't exist on the Hub"):
        read("owner/other")


def test_a_split_or_subset_that_does_not_exist_is_refused_with_the_choices(hub):
    with pytest.raises(UserError, match=r"Bad split: test\. Available splits: \['train', 'validation'\]"):
        read("owner/name", split="test")
    with pytest.raises(UserError, match=r"'other' not found\. Available: \['default'\]"):
        read("owner/name", subset="other")


def test_a_hub_row_without_text_is_refused(hub):
    with pytest.raises(UserError, match="'owner/name' has no column 'content'; its columns: 'id', 'text'"):
        read("owner/name", text_field="content")
    write_parquet(hub / "validation-00000-of-00001.parquet", ["one", None])
    with pytest.raises(UserError, match="Row 2 of the data set 'owner/name' has in column 'text' null"):
        read("owner/name", split="validation")


@pytest.mark.parametrize("target", ["file", "folder", "missing"])
def test_a_link_out_of_a_folder_is_refused(tmp_path, target):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    outside = tmp_path / "outside"
    if target == "file":
        outside.write_text("secret")
    elif target == "folder":
        outside.mkdir()
    (folder / "b.txt").symlink_to(outside)
    with pytest.raises(UserError, match=r"link '.*data/b\.txt' leads out of the data folder '.*data', to '.*outside'"):
        read(folder)


def test_links_are_followed_where_no_file_of_another_folder_is_read(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("one")
    (folder / "b.txt").symlink_to("sub/a.txt")
    (folder / "README").symlink_to(tmp_path / "elsewhere")
    (folder / ".hidden.txt").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(folder)
    assert read(tmp_path / "link") == ["one", "one"]


def test_a_link_given_by_name_or_glob_is_read(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "data" / "b.txt").symlink_to(tmp_path / "a.txt")
    assert read(tmp_path / "data" / "b.txt") == ["one"]
    assert read(tmp_path / "data" / "*.txt") == ["one"]


@pytest.mark.parametrize("name", ["a.txt", "a.parquet"])
def test_reading_goes_on_from_any_place(tmp_path, name):
    if name == "a.txt":
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(f"text {i}" for i in range(9)))
    else:
        write_parquet(tmp_path / name, [f"text {i}" for i in range(9)])
    places = list(read_places(find_source(str(tmp_path)), text_field="text", document_separator="<|endoftext|>"))
    for number, (_, place) in enumerate(places, start=1):
        rest = read_places(
            find_source(str(tmp_path)), text_field="text", document_separator="<|endoftext|>", place=place
        )
        assert list(rest) == places[number:]
