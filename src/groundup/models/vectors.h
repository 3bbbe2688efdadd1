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

/* Its lanes in another order: each at the place of the one `by` away. */
INLINE Floats crossed(Floats v, const int by) {
    Ints order;
    UNROLL for (int l = 0; l < LANES; l++) order[l] = l ^ by;
#ifdef __clang__
    Floats w;
    UNROLL for (int l = 0; l < LANES; l++) w[l] = v[l ^ by];
    return w;
#else
    return __builtin_shuffle(v, order);
#endif
}

/* A square of LANES vectors, rows for columns. */
INLINE void transposed(Floats t[LANES]) {
#ifdef __clang__
    for (int i = 0; i < LANES; i++) for (int l = 0; l < i; l++) {
        float x = t[i][l];
        t[i][l] = t[l][i];
        t[l][i] = x;
    }
#else
    UNROLL for (int by = 1; by < LANES; by *= 2) {
        Ints low, high;
        UNROLL for (int l = 0; l < LANES; l++) {
            low[l] = l & by ? LANES + l - by : l;
            high[l] = l & by ? LANES + l : l + by;
        }
        UNROLL for (int i = 0; i < LANES; i++) if (!(i & by)) {
            Floats a = t[i], b = t[i | by];
            t[i] = __builtin_shuffle(a, b, low);
            t[i | by] = __builtin_shuffle(a, b, high);
        }
    }
#endif
}

INLINE float total(Floats v) {
    UNROLL for (int by = LANES / 2; by; by /= 2) v += crossed(v, by);
    return v[0];
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
