// Chunks of work on a pool that others use too, without ever waiting for the pool.

#ifndef ADAMW_XLA_PARALLEL_H_
#define ADAMW_XLA_PARALLEL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace adamw {

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
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_finished.wait(
      lock, [&] { return state->finished.load(std::memory_order_acquire) == chunks; });
}

}  // namespace adamw

#endif  // ADAMW_XLA_PARALLEL_H_
