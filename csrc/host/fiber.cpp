#include "csrc/host/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastseg::host {
namespace {

// Generous, because frames grow under the sanitizers. Only pages that are touched cost memory.
constexpr size_t kStackSize = 256 << 10;

size_t page_size() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

// The fiber that start() belongs to: set just before a fiber is entered for the first time.
Fiber* starting;

}  // namespace

#ifndef FASTSEG_HOST_UCONTEXT

// void fastseg_switch_stack(void** save_stack_pointer, void* new_stack_pointer)
// Saves what a function call must preserve, changes stacks, and returns on the new one. Barriers
// are ten times faster so than with swapcontext(), which makes a system call for the signal mask.
extern "C" void fastseg_switch_stack(void** save, void* next);
asm(R"(
    .text
    .hidden fastseg_switch_stack
    .globl fastseg_switch_stack
    .type fastseg_switch_stack, @function
fastseg_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size fastseg_switch_stack, . - fastseg_switch_stack
)");

void Fiber::switch_context(Context& from, Context& to) { fastseg_switch_stack(&from, to); }

#else

void Fiber::switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

#endif

Fiber::Fiber(void (*entry)()) : entry_(entry) {
  void* memory = mmap(nullptr, page_size() + kStackSize, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(memory);
  mprotect(mapping_, page_size(), PROT_NONE);  // a stack that overflows faults here
  reset();
}

Fiber::~Fiber() { munmap(mapping_, page_size() + kStackSize); }

void Fiber::reset() {
  char* const stack = mapping_ + page_size();
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, kStackSize);  // frames that were dropped left red zones
#endif
#ifdef FASTSEG_HOST_UCONTEXT
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack;
  own_.uc_stack.ss_size = kStackSize;
  own_.uc_link = nullptr;
  makecontext(&own_, &Fiber::start, 0);
#else
  // What fastseg_switch_stack pops: six registers and the address it returns to. That leaves the
  // stack pointer 8 below a multiple of 16, as at the start of any function. The zero in rbp and
  // in the return address's place above tell debuggers that the stack ends here.
  auto* top = reinterpret_cast<uintptr_t*>(stack + kStackSize - 64);
  top[0] = 0;
  top[-1] = 0;
  top[-2] = reinterpret_cast<uintptr_t>(&Fiber::start);
  for (int i = 3; i <= 8; ++i) top[-i] = 0;
  own_ = top - 8;
#endif
}

void Fiber::start() {
  Fiber& self = *starting;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &self.caller_stack_, &self.caller_stack_size_);
#endif
  self.entry_();
  __builtin_unreachable();
}

void Fiber::resume() {
  starting = this;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, mapping_ + page_size(), kStackSize);
#endif
  switch_context(caller_, own_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, caller_stack_, caller_stack_size_);
#endif
  switch_context(own_, caller_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &caller_stack_, &caller_stack_size_);
#endif
}

}  // namespace fastseg::host
