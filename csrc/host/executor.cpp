// The scheduler behind cuda_on_cpu.h, whose head tells how it all works. Over 500 lines, because
// barriers, warps, copies and errors are states of one loop that read worse apart.
#include "csrc/host/executor.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "csrc/host/fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fastseg::host {
namespace {

constexpr int kPoison = 0xFF;  // in every byte: NaN as fp16, bf16, fp32 and fp64, -1 as an integer

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string text(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }

std::string lanes_text(uint32_t lanes) {
  std::string out;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes >> lane & 1) out += (out.empty() ? "" : ", ") + std::to_string(lane);
  }
  return out;
}

// Index number `i` of an array of this size, x fastest: how CUDA numbers the threads of a block.
uint3 unflatten(int64_t i, dim3 size) {
  return uint3{static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
               static_cast<unsigned>(i / size.x / size.y)};
}

// In which order blocks start, threads of a block start, and threads that met go on.
class Order {
 public:
  static Order from_environment() {
    const char* value = std::getenv("FASTSEG_HOST_ORDER");
    const std::string name = value == nullptr || *value == '\0' ? "forward" : value;
    const std::string shuffled = "shuffled:";
    if (name == "forward") return Order(Kind::kForward, 0);
    if (name == "reverse") return Order(Kind::kReverse, 0);
    if (name.compare(0, shuffled.size(), shuffled) == 0) {
      char* end;
      const unsigned long long seed = std::strtoull(name.c_str() + shuffled.size(), &end, 10);
      if (name.size() > shuffled.size() && *end == '\0') return Order(Kind::kShuffled, seed);
    }
    throw std::runtime_error(
        "fastseg: expected FASTSEG_HOST_ORDER to be forward, reverse or shuffled:SEED, but got '" +
        name + "'");
  }

  template <typename Iterator>
  void arrange(Iterator begin, Iterator end) {
    if (kind_ == Kind::kReverse) std::reverse(begin, end);
    if (kind_ == Kind::kShuffled) std::shuffle(begin, end, random_);
  }

  template <typename T>
  void number(std::vector<T>& numbers) {
    std::iota(numbers.begin(), numbers.end(), T{0});
    arrange(numbers.begin(), numbers.end());
  }

 private:
  enum class Kind { kForward, kReverse, kShuffled };
  Order(Kind kind, uint64_t seed) : kind_(kind), random_(seed) {}
  Kind kind_;
  std::mt19937_64 random_;
};

// The shared memory of the running block. Each array is a heap block of exactly its size, so that
// AddressSanitizer sees the first byte beyond it.
class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() {
    for (const Array& array : arrays_) std::free(array.memory);
  }

  void* find(const void* key) const {
    for (const Array& array : arrays_) {
      if (array.key == key) return array.memory;
    }
    return nullptr;
  }

  void* add(const void* key, size_t bytes, size_t alignment) {
    void* memory;
    if (posix_memalign(&memory, std::max<size_t>(alignment, 16), bytes) != 0) {
      throw std::bad_alloc();
    }
    arrays_.push_back(Array{key, static_cast<unsigned char*>(memory), bytes});
    std::memset(memory, kPoison, bytes);
    total_bytes_ += bytes;
    return memory;
  }

  void poison() {
    for (const Array& array : arrays_) std::memset(array.memory, kPoison, array.bytes);
  }

  bool contains(const void* address) const {
    const auto* byte = static_cast<const unsigned char*>(address);
    return std::any_of(arrays_.begin(), arrays_.end(), [byte](const Array& array) {
      return array.memory <= byte && byte < array.memory + array.bytes;
    });
  }

  size_t total_bytes() const { return total_bytes_; }

 private:
  struct Array {
    const void* key;
    unsigned char* memory;
    size_t bytes;
  };
  std::vector<Array> arrays_;
  size_t total_bytes_ = 0;
};

// One thread's arrival at something that threads do together.
struct Arrival {
  const char* operation;
  Place place;
  void* part;
  Complete complete;
  bool whole_block;
  uint32_t mask;   // of a warp operation
  bool all_lanes;  // of a warp operation

  bool same_meeting(const Arrival& other) const {
    return place.line == other.place.line && same_text(place.file, other.place.file) &&
           same_text(operation, other.operation) && mask == other.mask;
  }

  static bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
};

struct AsyncCopy {
  unsigned char* to;
  const unsigned char* from;
  size_t bytes, source_bytes;  // what is beyond source_bytes becomes zero
  int group;
};

enum class State : uint8_t { kUnstarted, kRunning, kWaiting, kReady, kExited };

struct Thread {
  uint3 index;
  State state;
  Fiber* fiber;  // while it waits, or is ready to go on
  Arrival arrival;
  std::vector<AsyncCopy> copies;  // issued, not yet waited for
  int async_group;                // the group that the next async_commit() closes
};

struct Warp {
  uint32_t waiting;  // lanes in a warp operation
  uint32_t exited;   // or beyond the end of the block
};

void fiber_main();

// Fibers are kept from launch to launch; as many exist as threads ever waited at the same time.
class FiberPool {
 public:
  Fiber* take() {
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>(fiber_main));
      idle_.push_back(fibers_.back().get());
    }
    Fiber* fiber = idle_.back();
    idle_.pop_back();
    return fiber;
  }

  void give_back(Fiber* fiber) { idle_.push_back(fiber); }

  // After an error: drops whatever the fibers were doing.
  void reset() {
    idle_.clear();
    for (const auto& fiber : fibers_) {
      fiber->reset();
      idle_.push_back(fiber.get());
    }
  }

 private:
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
};

FiberPool fiber_pool;

class Launch {
 public:
  Launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
         void (*body)(const void*), const void* argument)
      : kernel_(kernel),
        grid_(grid),
        body_(body),
        argument_(argument),
        order_(Order::from_environment()),
        threads_(size_t{block.x} * block.y * block.z),
        warps_((threads_.size() + kWarpSize - 1) / kWarpSize),
        start_order_(threads_.size()) {
    gridDim = grid;
    blockDim = block;
    for (size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].index = unflatten(static_cast<int64_t>(i), block);
    }
    dynamic_shared_ =
        static_cast<unsigned char*>(shared_.add(&dynamic_shared_, dynamic_shared_bytes, 16));
  }

  // ---- On the stack of the caller of launch() ----

  void run() {
    std::vector<int64_t> blocks(size_t{grid_.x} * grid_.y * grid_.z);
    order_.number(blocks);
    for (const int64_t block : blocks) {
      blockIdx = unflatten(block, grid_);
      run_block();
    }
  }

  // ---- On a fiber ----

  // What a fiber does: runs threads to their end, one after another, for as long as there are
  // some to start. A kernel that never waits so runs on one fiber, without any change of stacks.
  void run_threads() {
    while (!failed() && next_to_start_ < start_order_.size()) {
      enter(threads_[start_order_[next_to_start_++]]);
      try {
        body_(argument_);
      } catch (...) {
        exception_ = std::current_exception();
      }
      exit_thread();
    }
    fiber_pool.give_back(fiber_);
    fiber_->suspend();
  }

  void meet(const Arrival& arrival) {
    Thread& self = *running_;
    self.arrival = arrival;
    self.state = State::kWaiting;
    self.fiber = fiber_;
    if (!arrival.whole_block) {
      const size_t number = &self - threads_.data();
      const uint32_t lane_bit = uint32_t{1} << number % kWarpSize;
      if (!(arrival.mask & lane_bit)) {
        fail(std::string(arrival.operation) + " is called by lane " +
                 std::to_string(number % kWarpSize) + ", which is not in its mask " +
                 mask_text(arrival.mask),
             arrival.place);
      }
      warps_[number / kWarpSize].waiting |= lane_bit;
      complete_in_warp(number / kWarpSize, arrival);
    }
    fiber_->suspend();
  }

  [[noreturn]] void fail(const std::string& message, Place place) {
    error_ = head() + "thread " + text(running_->index) + " at " + text(place) + ": " + message;
    fiber_->suspend();
    __builtin_unreachable();  // the fiber is reset before its next use
  }

  Thread& running() { return *running_; }
  int thread_count() const { return static_cast<int>(threads_.size()); }
  SharedMemory& shared() { return shared_; }
  unsigned char* dynamic_shared() const { return dynamic_shared_; }

 private:
  bool failed() const { return !error_.empty() || exception_; }

  void run_block() {
    shared_.poison();
    for (Thread& thread : threads_) {
      thread.state = State::kUnstarted;
      thread.copies.clear();
      thread.async_group = 0;
    }
    std::fill(warps_.begin(), warps_.end(), Warp{0, 0});
    if (const size_t lanes_of_last = threads_.size() % kWarpSize; lanes_of_last != 0) {
      warps_.back().exited = ~uint32_t{0} << lanes_of_last;
    }
    order_.number(start_order_);
    next_to_start_ = 0;
    alive_ = threads_.size();

    while (alive_ > 0) {
      if (next_to_start_ < start_order_.size()) {
        fiber_ = fiber_pool.take();
      } else {
        if (ready_.empty()) complete_in_block();
        enter(threads_[ready_.front()]);
        ready_.pop_front();
        fiber_ = running_->fiber;
      }
      fiber_->resume();
      if (exception_) std::rethrow_exception(exception_);
      if (!error_.empty()) throw std::runtime_error(error_);
    }
  }

  void enter(Thread& thread) {
    running_ = &thread;
    thread.state = State::kRunning;
    threadIdx = thread.index;
  }

  void exit_thread() {
    running_->state = State::kExited;
    --alive_;
    const size_t number = running_ - threads_.data();
    Warp& warp = warps_[number / kWarpSize];
    warp.exited |= uint32_t{1} << number % kWarpSize;
    if (warp.waiting == 0) return;
    for (int lane = 0; lane < kWarpSize; ++lane) {  // this may be what some of them waited for
      if (!(warp.waiting >> lane & 1)) continue;
      complete_in_warp(number / kWarpSize, threads_[number / kWarpSize * kWarpSize + lane].arrival);
    }
  }

  // Lets the lanes of a warp operation go on, if all of them are there.
  void complete_in_warp(size_t warp_number, const Arrival& arrival) {
    Warp& warp = warps_[warp_number];
    if (arrival.mask & ~(warp.waiting | (arrival.all_lanes ? 0 : warp.exited))) return;
    const size_t first = warp_number * kWarpSize;
    const uint32_t lanes = arrival.mask & warp.waiting;
    void* parts[kWarpSize] = {};
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      if (!arrival.same_meeting(threads_[first + lane].arrival)) return;
      parts[lane] = threads_[first + lane].arrival.part;
    }
    arrival.complete(parts);
    warp.waiting &= ~lanes;
    const size_t before = ready_.size();
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes >> lane & 1) make_ready(first + lane);
    }
    order_.arrange(ready_.begin() + before, ready_.end());
  }

  // Nobody can run: either all threads that are left wait at one barrier, or they wait for ever.
  void complete_in_block() {
    const Arrival* first = nullptr;
    std::vector<void*> parts(threads_.size(), nullptr);
    for (size_t i = 0; i < threads_.size(); ++i) {
      if (threads_[i].state != State::kWaiting) continue;
      const Arrival& arrival = threads_[i].arrival;
      if (first == nullptr) first = &arrival;
      if (!arrival.whole_block || !first->same_meeting(arrival)) throw_stuck();
      parts[i] = arrival.part;
    }
    first->complete(parts.data());
    for (size_t i = 0; i < threads_.size(); ++i) {
      if (threads_[i].state == State::kWaiting) make_ready(i);
    }
    order_.arrange(ready_.begin(), ready_.end());
  }

  void make_ready(size_t number) {
    threads_[number].state = State::kReady;
    ready_.push_back(static_cast<int>(number));
  }

  // Says who waits where: one line for every warp operation and every barrier.
  [[noreturn]] void throw_stuck() const {
    constexpr size_t kMaxLines = 8;
    struct Group {
      size_t first, count;
      uint32_t lanes;
    };
    std::vector<Group> groups;
    for (size_t i = 0; i < threads_.size(); ++i) {
      if (threads_[i].state != State::kWaiting) continue;
      const auto same = [&](const Group& group) {
        return threads_[group.first].arrival.same_meeting(threads_[i].arrival) &&
               (threads_[i].arrival.whole_block || group.first / kWarpSize == i / kWarpSize);
      };
      auto group = std::find_if(groups.begin(), groups.end(), same);
      if (group == groups.end()) group = groups.insert(groups.end(), Group{i, 0, 0});
      ++group->count;
      group->lanes |= uint32_t{1} << i % kWarpSize;
    }
    std::string message =
        head() + "no thread can go on, because not all threads come to the same place:";
    for (size_t i = 0; i < std::min(groups.size(), kMaxLines); ++i) {
      const Group& group = groups[i];
      const Thread& thread = threads_[group.first];
      const Arrival& arrival = thread.arrival;
      message += "\n  thread " + text(thread.index);
      if (group.count > 1) message += " and " + std::to_string(group.count - 1) + " more";
      message += " in " + std::string(arrival.operation) + " at " + text(arrival.place);
      if (arrival.whole_block) continue;
      const uint32_t exited = warps_[group.first / kWarpSize].exited;
      const uint32_t absent = arrival.mask & ~group.lanes;
      message += ", mask " + mask_text(arrival.mask);
      if (absent & ~exited) message += ", waiting for lanes " + lanes_text(absent & ~exited);
      if (absent & exited && arrival.all_lanes) {
        message += ", without the exited lanes " + lanes_text(absent & exited);
      }
    }
    if (groups.size() > kMaxLines) {
      message += "\n  and " + std::to_string(groups.size() - kMaxLines) + " more places";
    }
    const size_t exited = threads_.size() - alive_;
    if (exited != 0) message += "\n  threads that have exited: " + std::to_string(exited);
    throw std::runtime_error(message);
  }

  std::string head() const {
    return "fastseg: " + kernel_name(kernel_) + ", block " + text(blockIdx) + ": ";
  }

  static std::string mask_text(uint32_t mask) {
    char buffer[16];
    std::snprintf(buffer, sizeof buffer, "0x%08x", static_cast<unsigned>(mask));
    return buffer;
  }

  const void* kernel_;
  dim3 grid_;
  void (*body_)(const void*);
  const void* argument_;
  Order order_;
  SharedMemory shared_;
  unsigned char* dynamic_shared_;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> start_order_;
  size_t next_to_start_ = 0;
  std::deque<int> ready_;  // threads that waited and may go on, first come first served
  size_t alive_ = 0;

  Thread* running_ = nullptr;
  Fiber* fiber_ = nullptr;  // the fiber that runs
  std::string error_;
  std::exception_ptr exception_;
};

std::mutex one_launch_at_a_time;
Launch* current;

void fiber_main() {
  for (;;) current->run_threads();
}

}  // namespace

void run(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
         void (*body)(const void*), const void* argument) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  Launch launch(kernel, grid, block, dynamic_shared_bytes, body, argument);
  current = &launch;
  try {
    launch.run();
  } catch (...) {
    fiber_pool.reset();
    throw;
  }
}

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) {
    return "a kernel without external linkage";
  }
  int status;
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : info.dli_sname;
}

unsigned char* dynamic_shared() { return current->dynamic_shared(); }

void* static_shared(const void* key, size_t bytes, size_t alignment, Place place) {
  SharedMemory& shared = current->shared();
  if (void* const memory = shared.find(key)) return memory;
  void* const memory = shared.add(key, bytes, alignment);
  if (shared.total_bytes() > kMaxSharedBytesPerBlock) {
    fail("the block has " + std::to_string(shared.total_bytes()) +
             " bytes of shared memory, and the limit is " + std::to_string(kMaxSharedBytesPerBlock),
         place);
  }
  return memory;
}

void meet_in_warp(const char* operation, uint32_t mask, void* part, Complete complete, Place place,
                  bool all_lanes) {
  current->meet(Arrival{operation, place, part, complete, false, mask, all_lanes});
}

void meet_in_block(const char* operation, void* part, Complete complete, Place place) {
  current->meet(Arrival{operation, place, part, complete, true, 0, false});
}

int block_threads() { return current->thread_count(); }

void async_copy(void* shared, const void* global, size_t bytes, size_t source_bytes, Place place) {
  auto* const to = static_cast<unsigned char*>(shared);
  const auto* const from = static_cast<const unsigned char*>(global);
  if (!current->shared().contains(to)) fail("cp.async to an address not in shared memory", place);
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) {
    fail("cp.async to an address that is no multiple of " + std::to_string(bytes), place);
  }
  if (source_bytes != 0) {
    if (reinterpret_cast<uintptr_t>(from) % bytes != 0) {
      fail("cp.async from an address that is no multiple of " + std::to_string(bytes), place);
    }
    // AddressSanitizer shall complain here, not at the wait.
    static_cast<void>(*static_cast<const volatile unsigned char*>(from));
    static_cast<void>(*static_cast<const volatile unsigned char*>(from + source_bytes - 1));
  }
  std::memset(to, kPoison, bytes);
  Thread& thread = current->running();
  thread.copies.push_back(AsyncCopy{to, from, bytes, source_bytes, thread.async_group});
}

void async_commit() { ++current->running().async_group; }

void async_wait(int groups_still_pending) {
  Thread& thread = current->running();
  const int first_pending = thread.async_group - groups_still_pending;
  auto copy = thread.copies.begin();
  for (; copy != thread.copies.end() && copy->group < first_pending; ++copy) {
    std::memset(copy->to, 0, copy->bytes);
    if (copy->source_bytes != 0) std::memcpy(copy->to, copy->from, copy->source_bytes);
  }
  thread.copies.erase(thread.copies.begin(), copy);
}

void fail(const std::string& message, Place place) { current->fail(message, place); }

}  // namespace fastseg::host
