// The ceiling of bench.py step: reads four streams and writes three, as AdamW does.
#include <stdint.h>

#define PROBE(NAME, T)                                                                   \
  void NAME(int leaves, const long* sizes, T** p, T** g, float** m, float** v) {         \
    _Pragma("omp parallel") for (int leaf = 0; leaf < leaves; ++leaf) {                  \
      T* restrict pp = p[leaf];                                                          \
      const T* restrict gg = g[leaf];                                                    \
      float* restrict mm = m[leaf];                                                      \
      float* restrict vv = v[leaf];                                                      \
      _Pragma("omp for simd schedule(static) nowait") for (long i = 0; i < sizes[leaf]; ++i) { \
        mm[i] += (float)gg[i];                                                           \
        vv[i] += (float)gg[i];                                                           \
        pp[i] += gg[i];                                                                  \
      }                                                                                  \
    }                                                                                    \
  }

PROBE(probe, float)
PROBE(probe_16, uint16_t)
