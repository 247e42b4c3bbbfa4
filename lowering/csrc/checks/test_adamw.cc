// The kernel without XLA, for the sanitizers: every instruction set, dtype and option
// between guard zones, the cutting of trees into chunks, and the sharing of work.
//
// What is asserted is equality of bits: of an element with the same element computed
// alone, by the baseline. The values themselves are the Python tests' business.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "isa/isa.h"
#include "parallel.h"
#include "tree.h"

namespace adamw {
namespace {

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) {                                                      \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);   \
      std::abort();                                                          \
    }                                                                        \
  } while (false)

using Int64 = std::int64_t;

constexpr DType kDTypes[] = {DType::kBF16, DType::kF16, DType::kF32, DType::kF64};

Int64 Width(DType dtype) { return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2; }

// Of what a loop may leave out, all is on, one thing is (or its slot), or nothing.
enum On { kAllOn = kNumSlots, kCautious, kLeafScale, kNoneOn, kNumOn };

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kAlmostInfinity = 1e300;  // as a float, infinity; no loop leaves it out

// The number that turns a slot's option off; -1 where there is none.
double OffOf(int slot, double infinity) {
  static_assert(kNumSlots == 17, "a number for each slot");
  const double off[kNumSlots] = {-1, -1, -1, -1, -1, -1, -1, -1, -1,
                                 infinity, -1, -1, -1, -1, 0, 0, -1};
  return off[slot];
}

enum Rounding { kNearest, kStochastic, kSplit, kNumRoundings };

// A heap block between guard zones; AddressSanitizer sees where the block ends.
class Buffer {
 public:
  Buffer(Int64 bytes, unsigned seed) : bytes_(bytes), block_(new unsigned char[bytes + 2 * kGuard]) {
    std::mt19937 random(seed);
    for (Int64 i = 0; i < bytes; ++i) data()[i] = static_cast<unsigned char>(random());
    std::memset(block_.get(), kCanary, kGuard);
    std::memset(block_.get() + kGuard + bytes, kCanary, kGuard);
  }
  Buffer(const Buffer& other) : Buffer(other.bytes_, 0) { std::memcpy(data(), other.data(), bytes_); }
  Buffer(Buffer&&) = default;

  unsigned char* data() const { return block_.get() + kGuard; }

  bool operator==(const Buffer& other) const {
    for (Int64 i = 0; i < kGuard; ++i) {
      CHECK(block_[i] == kCanary && block_[kGuard + bytes_ + i] == kCanary);
    }
    return bytes_ == other.bytes_ && std::memcmp(data(), other.data(), bytes_) == 0;
  }

 private:
  static constexpr Int64 kGuard = 64;
  static constexpr unsigned char kCanary = 0xA5;
  Int64 bytes_;
  std::unique_ptr<unsigned char[]> block_;
};

using Buffers = std::vector<Buffer>;

// Finite values, since a NaN's payload may differ between vector and scalar code: random
// bits with the exponent's upper half cleared or set to that of one.
void MakeTame(Buffer& buffer, DType dtype, Int64 size, bool positive) {
  const Int64 width = Width(dtype);
  for (Int64 i = 0; i < size; ++i) {
    unsigned char* top = buffer.data() + i * width + width - 1;
    const unsigned char sign = positive ? 0 : *top & 0x80;
    *top = sign | (dtype == DType::kF16 ? 0x38 | (*top & 3) : 0x3f);
    if (dtype != DType::kF16) top[-1] &= 0xbf;
  }
}

struct Case {
  DType param, grad, state;
  bool amsgrad, ema, words;
  Rounding rounding;
  int on = kAllOn;

  DType Of(int kind) const {
    switch (kind) {
      case kParams: return param;
      case kGrads: return grad;
      case kWords: return DType::kBF16;
      case kRemainder: return DType::kI16;
      default: return state;
    }
  }
  bool Has(int kind) const {
    switch (kind) {
      case kM:
      case kV: return !words;
      case kVMax: return amsgrad;
      case kEma: return ema;
      case kWords: return words;
      case kRemainder: return rounding == kSplit;
      default: return true;
    }
  }
  // Formats meet each other, and every gradient.
  bool Occurs() const {
    const bool narrow = param == DType::kBF16;
    return !(words && (amsgrad || state != DType::kF32 || param == DType::kF64)) &&
           (rounding == kNearest || (narrow && state == DType::kF32)) &&
           (on == kAllOn || (words && !ema && grad == param)) &&
           (on >= kNumSlots || OffOf(on, kInfinity) >= 0);
  }
};

Buffers MakeLeaf(const Case& which, Int64 size, unsigned seed) {
  Buffers buffers;
  for (int k = 0; k < kNumKinds; ++k) {
    buffers.emplace_back(which.Has(k) ? size * Width(which.Of(k)) : 0, seed + k);
    // Any word and remainder may be.
    if (k == kWords || k == kRemainder) continue;
    if (which.Has(k)) MakeTame(buffers[k], which.Of(k), size, k == kV || k == kVMax);
  }
  return buffers;
}

std::vector<float> MakeHyper(Int64 rows) {
  std::vector<float> hyper(rows * kNumSlots);
  for (Int64 row = 0; row < rows; ++row) {
    static_assert(kNumSlots == 17, "a number for each slot");
    const double slots[kNumSlots] = {0.7, 0.02, 1.3, 3e-3, 0.88, 0.12, 0.95,
                                     0.05, 1e-3, 0.5, 0.9, 0.1, 1.0, 1.0, 1e-4, 5e-3, 7.0};
    for (int s = 0; s < kNumSlots; ++s) {
      hyper[row * kNumSlots + s] = static_cast<float>(slots[s] * (1 + 0.01 * row));
    }
  }
  return hyper;
}

// One slice [begin, end) of a leaf, updated in place; sums of it are wanted where there is room.
void UpdateSlice(const Case& which, const Buffers& leaf, Int64 begin, Int64 end, UpdateFn update,
                 double infinity = kInfinity, Squares* squares = nullptr) {
  static const std::vector<float> hyper = MakeHyper(1);
  Slice slice = {};
  slice.size = end - begin;
  slice.stochastic = which.rounding == kStochastic;
  slice.squares = squares;
  slice.grad_sums = true;
  slice.small_unit = 0x1p-84;
  const auto has = [&](int x) { return which.on == kAllOn || which.on == x; };
  slice.opposed = has(kCautious) ? 0 : -infinity;
  slice.leaf_scale = has(kLeafScale) ? 0.9 : 1;
  for (int s = 0; s < kNumSlots; ++s) {
    const double off = OffOf(s, infinity);
    slice.slots[s] = off < 0 || has(s) ? hyper[s] : off;
  }
  for (int k = 0; k < kNumKinds; ++k) {
    slice.dtype[k] = which.Of(k);
    if (!which.Has(k)) continue;
    unsigned char* data = leaf[k].data() + begin * Width(which.Of(k));
    slice.in[k] = data;
    if (k != kGrads) slice.out[k] = data;
  }
  update(slice);
}

void TestArithmetic(const Isa& isa) {
  const UpdateFn baseline = kIsas[kNumIsas - 1].update;
  for (DType param : kDTypes) for (DType grad : kDTypes) for (DType state : kDTypes)
    for (int options = 0; options < 8 * kNumRoundings * kNumOn; ++options)
    for (Int64 size : {0, 1, 15, 17, 64, 1103}) {
      const Case which = {param, grad, state, (options & 1) != 0, (options & 2) != 0,
                          (options & 4) != 0, static_cast<Rounding>(options / 8 % kNumRoundings),
                          options / 8 / kNumRoundings};
      if (!which.Occurs()) continue;
      const Buffers whole = MakeLeaf(which, size, 7);
      const Buffers single = whole, before = whole;
      UpdateSlice(which, whole, 0, size, isa.update);
      for (Int64 i = 0; i < size; ++i) {
        UpdateSlice(which, single, i, i + 1, baseline, kAlmostInfinity);
      }
      for (int k = 0; k < kNumKinds; ++k) CHECK(whole[k] == single[k]);
      CHECK(whole[kGrads] == before[kGrads]);
      // Beside sums the update is the same, and so are they on every instruction set.
      const Buffers summed = before, others = before;
      Squares sums = {}, others_sums = {};
      UpdateSlice(which, summed, 0, size, isa.update, kInfinity, &sums);
      UpdateSlice(which, others, 0, size, baseline, kAlmostInfinity, &others_sums);
      for (int k = 0; k < kNumKinds; ++k) CHECK(summed[k] == whole[k]);
      CHECK(std::memcmp(&sums, &others_sums, sizeof sums) == 0);
      CHECK((size == 0) == (sums.grads == 0) && (size == 0) == (sums.updates == 0));
      CHECK(size < 15 || !(whole[kParams] == before[kParams]));
    }
}

// A pool whose tasks start when its threads come to it, and whose callers do not wait.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Loop(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  void Schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    wake_.notify_one();
  }

 private:
  void Loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return closed_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

constexpr Case kWide = {DType::kBF16, DType::kF32, DType::kF32, true, true, false, kNearest};
constexpr Case kNarrow = {DType::kBF16, DType::kF32, DType::kF32, false, true, true, kSplit};
constexpr Case kPassed = {DType::kF32, DType::kF32, DType::kF32, false, true, true, kSplit};

// Leaves of many sizes, some batched; each test has buffers of its own.
void TestTree(Pool& pool, Int64 chunk, Int64 helpers, bool batched, bool wide_batch,
              const Case& which = kWide, bool skip = false) {
  const Int64 sizes[] = {5000, 0, 1, 63, 64, 65, 20'000, 3};
  const Int64 full[] = {2, 3}, ones[] = {1, 1}, some[] = {2, 1};
  const Int64 rows = batched ? 6 : 1;
  std::vector<float> hyper = MakeHyper(2 * 2);
  if (skip) hyper[APPLY] = 0;  // for a group and, in a wide batch, for half of the members
  const bool summed = chunk % kSumBlock == 0;
  std::vector<Buffers> leaves, alone;
  for (Int64 size : sizes) {
    leaves.push_back(MakeLeaf(which, rows * size, static_cast<unsigned>(size)));
    alone.push_back(leaves.back());
  }
  const auto make_tree = [&](std::vector<Buffers>& buffers) {
    Tree::Scalars scalars = {};
    scalars.hyper = {hyper.data(), wide_batch ? some : ones};
    scalars.groups = 2;
    scalars.batch_rank = batched ? 2 : 0;
    scalars.options.words = which.words;
    scalars.options.split_master = which.rounding == kSplit;
    scalars.options.skip = skip;
    scalars.options.leaf_sums = scalars.options.grad_sums = summed;
    std::vector<Leaf> result;
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      Leaf leaf = {};
      leaf.batch = full;
      leaf.rows = rows;
      leaf.size = sizes[i];
      leaf.group = i % 2;
      for (int k = 0; k < kNumKinds; ++k) {
        leaf.dtype[k] = which.Of(k);
        if (!which.Has(k)) continue;
        leaf.in[k] = {buffers[i][k].data(), full};
        leaf.out[k] = k == kGrads ? nullptr : buffers[i][k].data();
      }
      result.push_back(leaf);
    }
    return Tree(scalars, std::move(result));
  };
  Tree tree = make_tree(leaves), reference = make_tree(alone);
  const Buffers first = alone[0];
  const UpdateFn update = BestIsa().update;
  ParallelFor((tree.size() + chunk - 1) / chunk, helpers,
              [&](auto task) { pool.Schedule(std::move(task)); },
              [&](Int64 i) { tree.Update(i * chunk, (i + 1) * chunk, update); });
  reference.Update(0, reference.size(), update);
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    for (int k = 0; k < kNumKinds; ++k) CHECK(leaves[i][k] == alone[i][k]);
  }
  if (summed) {
    std::vector<double> sums(rows * 8 * 4), others(rows * 8 * 4);
    tree.WriteSums(full, sums.data());
    reference.WriteSums(full, others.data());
    CHECK(std::memcmp(sums.data(), others.data(), sums.size() * sizeof(double)) == 0);
    for (Int64 row = 0, i = 0; row < rows; i == 7 ? ++row, i = 0 : ++i) {
      const double* own = &sums[(row * 8 + i) * 4];
      const bool kept = skip && i % 2 == 0 && (!wide_batch || row < 3), full = sizes[i] > 0;
      CHECK((own[0] > 0) == full && (own[2] > 0) == full && (own[3] > 0) == (full && !kept));
    }
  }
  if (skip) return;
  const bool completes = which.param == DType::kBF16;
  CHECK((alone[0][kRemainder] == first[kRemainder]) == !(which.rounding == kSplit && completes));
}

// This program's threads keep subnormals, unlike XLA's.
void TestSubnormalsAreFlushed() {
#if defined(__SSE__) || defined(__aarch64__)
  const std::vector<float> hyper = MakeHyper(1);
  float p = 1.0f, g = 0.0f, m = 1e-39f, v = 1e-39f;
  Leaf leaf = {};
  leaf.rows = leaf.size = 1;
  float* const operands[] = {&p, &g, &m, &v};
  for (int k = kParams; k <= kV; ++k) {
    leaf.dtype[k] = DType::kF32;
    leaf.in[k] = {operands[k], nullptr};
    leaf.out[k] = k == kGrads ? nullptr : operands[k];
  }
  Tree::Scalars scalars = {};
  scalars.hyper = {hyper.data(), nullptr};
  scalars.groups = 1;
  Tree tree(scalars, {leaf});
  tree.Update(0, tree.size(), BestIsa().update);
  CHECK(m == 0.0f && v == 0.0f);
  volatile float half = 0.5f;
  CHECK(1e-39f * half != 0.0f);  // the thread's own mode is back
#endif
}

void TestAPoolThatNeverStartsATask() {
  std::vector<std::function<void()>> late;
  int done = 0;
  ParallelFor(10, 4, [&](auto task) { late.push_back(std::move(task)); }, [&](Int64) { ++done; });
  CHECK(done == 10 && late.size() == 4);
  for (const auto& task : late) task();  // the body is gone; they must not touch it
  CHECK(done == 10);
}

void TestCallersOnTheirOwnPool() {
  Pool pool(2);
  std::atomic<int> done{0};
  for (int i = 0; i < 50; ++i) {
    pool.Schedule([&pool, &done] {
      ParallelFor(64, 2, [&](auto task) { pool.Schedule(std::move(task)); },
                  [&](Int64) { done.fetch_add(1); });
    });
  }
  while (done.load() < 50 * 64) std::this_thread::yield();
}

int Main() {
  for (int i = 0; i < kNumIsas; ++i) {
    std::printf("%s: %s\n", kIsas[i].name, kIsas[i].supported() ? "tested" : "not supported here");
    if (kIsas[i].supported()) TestArithmetic(kIsas[i]);
  }
  Pool pool(3);
  for (Int64 chunk : {Int64{64}, kSumBlock, 128 * kSumBlock}) for (Int64 helpers : {0, 1, 5}) {
    TestTree(pool, chunk, helpers, false, false);
    TestTree(pool, chunk, helpers, true, false);
    TestTree(pool, chunk, helpers, true, true);
    TestTree(pool, chunk, helpers, true, true, kWide, true);
    for (const Case& which : {kNarrow, kPassed}) TestTree(pool, chunk, helpers, true, true, which);
  }
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] { for (int n = 0; n < 5; ++n) TestTree(pool, 512, 3, true, true); });
  }
  for (std::thread& caller : callers) caller.join();
  TestSubnormalsAreFlushed();
  TestAPoolThatNeverStartsATask();
  TestCallersOnTheirOwnPool();
  std::puts("all tests passed");
  return 0;
}

}  // namespace
}  // namespace adamw

int main() { return adamw::Main(); }
