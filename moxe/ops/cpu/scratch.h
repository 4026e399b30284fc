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
    if (bytes > held().bytes) {
      std::free(held().memory);
      held() = {};
      const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      void* memory = std::aligned_alloc(kAlignment, rounded);
      if (memory == nullptr) throw std::bad_alloc();
      held() = {memory, rounded};
    }
    next_ = static_cast<char*>(held().memory);
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
  struct Held {
    void* memory = nullptr;
    int64_t bytes = 0;
    ~Held() { std::free(memory); }
  };
  static Held& held() {
    thread_local Held block;
    return block;
  }
  char* next_;
};

}  // namespace moxe
