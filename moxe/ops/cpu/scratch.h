// Working memory of one task: a few arrays, aligned for vectors, from a block that each thread keeps.
#pragma once

#include <cstdlib>
#include <new>

#include "cpu/vector.h"

namespace moxe {

// Hands out arrays one behind the other; they are gone when the next task of this thread begins.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    Block& block = own_block();
    if (bytes > block.bytes) block.grow(bytes);
    next_ = static_cast<char*>(block.memory);
  }

  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += bytes_of<T>(count);
    return array;
  }

  // What `take` uses up for an array.
  template <class T>
  static int64_t bytes_of(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
  }

 private:
  static constexpr int64_t kAlignment = 64;
  // Never copied: it frees its memory when its thread ends.
  struct Block {
    void* memory = nullptr;
    int64_t bytes = 0;

    Block() = default;
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    ~Block() { std::free(memory); }

    void grow(int64_t wanted) {
      std::free(memory);
      bytes = (wanted + kAlignment - 1) / kAlignment * kAlignment;
      memory = std::aligned_alloc(kAlignment, bytes);
      if (memory == nullptr) {
        bytes = 0;
        throw std::bad_alloc();
      }
    }
  };
  static Block& own_block() {
    thread_local Block block;
    return block;
  }
  char* next_;
};

}  // namespace moxe
