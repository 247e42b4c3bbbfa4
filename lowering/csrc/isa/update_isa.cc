// The arithmetic for one instruction set; the build compiles this file once for each.

#include "adamw.h"

namespace adamw {

#define ADAMW_CONCAT_(a, b) a##b
#define ADAMW_CONCAT(a, b) ADAMW_CONCAT_(a, b)

extern void ADAMW_CONCAT(Update_, ADAMW_ISA)(const Slice& slice);

void ADAMW_CONCAT(Update_, ADAMW_ISA)(const Slice& slice) { ADAMW_ISA::Update(slice); }

}  // namespace adamw
