// Which instruction sets were compiled, and which this processor runs.

#ifndef ADAMW_XLA_ISA_H_
#define ADAMW_XLA_ISA_H_

#include "slice.h"

namespace adamw {

struct Isa {
  const char* name;
  UpdateFn update;
  bool (*supported)();
};

// Best first; the last one always runs.
extern const Isa kIsas[];
extern const int kNumIsas;

// The best one for this processor.
const Isa& BestIsa();

}  // namespace adamw

#endif  // ADAMW_XLA_ISA_H_
