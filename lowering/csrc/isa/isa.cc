#include "isa.h"

namespace adamw {

void Update_baseline(const Slice&);
#ifdef ADAMW_X86
void Update_avx2(const Slice&);
void Update_avx512(const Slice&);
#endif

const Isa kIsas[] = {
#ifdef ADAMW_X86
    // The builtin also asks whether the operating system saves these registers.
    {"avx512", Update_avx512,
     [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"); }},
    {"avx2", Update_avx2, [] { return __builtin_cpu_supports("avx2") != 0; }},
#endif
    {"baseline", Update_baseline, [] { return true; }},
};
const int kNumIsas = sizeof kIsas / sizeof kIsas[0];

const Isa& BestIsa() {
  static const Isa& best = *[] {
    const Isa* isa = kIsas;
    while (!isa->supported()) ++isa;
    return isa;
  }();
  return best;
}

}  // namespace adamw
