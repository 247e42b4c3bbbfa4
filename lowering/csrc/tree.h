// Many leaves as one range of elements, cut into chunks of equal size.

#ifndef ADAMW_XLA_TREE_H_
#define ADAMW_XLA_TREE_H_

#include <cstdint>
#include <vector>

#include "slice.h"

namespace adamw {

// A buffer and its leading batch dimensions. A dimension of size 1 repeats.
struct Operand {
  const void* data;
  const std::int64_t* batch;
};

struct Leaf {
  Operand in[kNumKinds];         // data is null where the option is off
  void* out[kNumKinds];          // null for gradients and where the option is off
  DType dtype[kNumKinds];
  const std::int64_t* batch;     // the results' batch dimensions
  std::int64_t rows;             // how many rows of hyper it reads: its batch
  std::int64_t size;             // elements of each row
  std::int64_t group, index;     // its row of hyper, its column of leaf_scale
};

// The update of several leaves.
class Tree {
 public:
  struct Scalars {
    Operand hyper;        // [*batch, groups, slots]
    std::int64_t groups;
    Operand leaf_scale;   // [*batch, leaves], or null
    std::int64_t leaves;
    bool wide;            // both are float64; else float32
    int batch_rank;
    Options options;
  };

  Tree(const Scalars& scalars, std::vector<Leaf> leaves);

  // How many elements there are to chunk, padding between leaves included.
  std::int64_t size() const { return ends_.empty() ? 0 : ends_.back(); }

  // How many elements there are.
  std::int64_t elements() const { return elements_; }

  // Chunk boundaries at multiples of this stay at whole cache lines within each leaf, and at
  // whole blocks of its sums.
  std::int64_t grain() const { return sums_ ? kSumBlock : 64; }

  // Updates elements [begin, end) of the range.
  void Update(std::int64_t begin, std::int64_t end, UpdateFn update);

  // Once all are updated, writes the sums: [*batch, kinds] of the whole tree, or
  // [*batch, leaves, kinds], where each leaf's batch repeats within `batch`.
  void WriteSums(const std::int64_t* batch, double* out) const;

 private:
  void UpdateLeaf(std::size_t i, std::int64_t begin, std::int64_t end, UpdateFn update);
  bool SetScalars(const Leaf& leaf, std::int64_t row, Slice& slice) const;
  Squares RowSquares(std::size_t i, std::int64_t row) const;

  const Scalars scalars_;
  const bool sums_;
  std::vector<Leaf> leaves_;
  std::vector<std::int64_t> ends_;  // where each leaf ends in the range
  std::int64_t elements_ = 0;
  // A leaf's rows and blocks cut it up, and its squares are those of the pieces: that of row r
  // and block b is the one at r + b, behind the leaf's first.
  std::vector<Squares> squares_;
  std::vector<std::int64_t> firsts_;
};

}  // namespace adamw

#endif  // ADAMW_XLA_TREE_H_
