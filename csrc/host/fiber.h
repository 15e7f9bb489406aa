// A function on a stack of its own, which can be left in the middle and entered again.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(FASTSEG_HOST_UCONTEXT)
#define FASTSEG_HOST_UCONTEXT
#endif
#ifdef FASTSEG_HOST_UCONTEXT
#include <ucontext.h>
#endif

namespace fastseg::host {

class Fiber {
 public:
  // `entry` starts at the first resume() and must never return.
  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Enters the fiber; comes back when it calls suspend().
  void resume();
  // Called on the fiber: goes back to whoever resumed it.
  void suspend();
  // Forgets what the fiber was doing, without unwinding: the next resume() calls `entry` anew.
  void reset();

 private:
#ifdef FASTSEG_HOST_UCONTEXT
  using Context = ucontext_t;
#else
  using Context = void*;  // the stack pointer; everything else is saved on the stack
#endif

  static void start();
  static void switch_context(Context& from, Context& to);

  void (*entry_)();
  char* mapping_;  // a guard page, then the stack
  Context own_, caller_;

  // What AddressSanitizer wants to know about a change of stacks.
  const void* caller_stack_ = nullptr;
  size_t caller_stack_size_ = 0;
};

}  // namespace fastseg::host
