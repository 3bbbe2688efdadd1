/* Small things on vectors of float32, for decode.c and train.c. */

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__) && defined(WIDE)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE Floats load(const float *p) { return *(const Floats *)p; }
INLINE void store(float *p, Floats v) { *(Floats *)p = v; }
INLINE Floats all(float x) { return x - (Floats){0}; }

INLINE float total(Floats v) {
    float sum = 0;
    UNROLL for (int l = 0; l < LANES; l++) sum += v[l];
    return sum;
}

INLINE Floats larger(Floats a, Floats b) { /* NaN in b stays */
    Ints first = a > b;
    return (Floats)((first & (Ints)a) | (~first & (Ints)b));
}

/* e^x: 2^k * e^r with |r| <= ln(2) / 2, and e^r by its series, to float32's rounding. */
INLINE Floats exponential(Floats x) {
    x = -larger(all(-88), -larger(all(-87), x));
    Floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the rounded number is in the lowest bits */
    Floats k = shifted - 12582912.0f;
    Floats r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    Floats p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (Floats)(((Ints)shifted + 127) << 23);
}

static float dot(const float *a, const float *b, int64_t n) {
    Floats s = {0}, t = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        s += load(a + i) * load(b + i);
        t += load(a + i + LANES) * load(b + i + LANES);
    }
    float sum = total(s + t);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}
