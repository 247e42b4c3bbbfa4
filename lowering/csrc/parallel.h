// Chunks of work on a pool that others use too, without ever waiting for the pool.

#ifndef ADAMW_XLA_PARALLEL_H_
#define ADAMW_XLA_PARALLEL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace adamw {

// Tells the processor that this thread is only waiting.
inline void Relax() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How often to look before sleeping: some 50 us, the time that a sleep and a wake-up take.
constexpr int kLooks = 2000;

// Runs body(0) ... body(chunks - 1), each once, on the caller and on up to `helpers`
// tasks given to schedule(task).
//
// A pool may be busy with callers like this one, all of them waiting. So the caller
// works through the chunks itself and waits only for chunks that a running helper has
// claimed. A helper that starts after that finds nothing to claim; it then touches only
// the state that it shares in owning, not the body, which is gone.
template <typename Schedule, typename Body>
void ParallelFor(std::int64_t chunks, std::int64_t helpers, const Schedule& schedule,
                 const Body& body) {
  struct State {
    State(std::int64_t chunks, const Body& body) : chunks(chunks), body(body) {}

    void Work() {
      std::int64_t done = 0;
      for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks; ++done) {
        body(i);
      }
      // Publishes what the chunks wrote to whoever sees the last of them finished.
      if (done > 0 && finished.fetch_add(done, std::memory_order_acq_rel) + done == chunks) {
        std::lock_guard<std::mutex> lock(mutex);
        all_finished.notify_one();
      }
    }

    const std::int64_t chunks;
    const Body& body;
    std::atomic<std::int64_t> next{0};
    std::atomic<std::int64_t> finished{0};
    std::mutex mutex;
    std::condition_variable all_finished;
  };

  if (helpers > chunks - 1) helpers = chunks - 1;
  if (helpers <= 0) {
    for (std::int64_t i = 0; i < chunks; ++i) body(i);
    return;
  }
  const auto state = std::make_shared<State>(chunks, body);
  for (std::int64_t i = 0; i < helpers; ++i) {
    schedule([state] { state->Work(); });
  }
  state->Work();
  const auto done = [&] { return state->finished.load(std::memory_order_acquire) == chunks; };
  for (int i = 0; i < kLooks; ++i) {
    if (done()) return;
    Relax();
  }
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_finished.wait(lock, done);
}

}  // namespace adamw

#endif  // ADAMW_XLA_PARALLEL_H_
