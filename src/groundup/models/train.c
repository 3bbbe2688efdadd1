/* Passes over the activations of a training on a CPU, each of which torch makes of several operations. models/fused.py calls them.

   A row is always computed in one order, whatever the number of rows and threads; so are sums over rows, which are made of blocks of fixed size. */

#define WIDE
#include "vectors.h"

float logf(float);

enum { BLOCK = 64 };  /* rows that are summed together */
enum { PIECE = 2048 }; /* numbers of one unit of work where there are no rows */


/* y = x * inverse * weight with inverse = 1 / sqrt(mean(x²) + eps); rows of w numbers. */
void groundup_norm(int64_t n, int64_t w, float eps, const float *x, const float *weight, float *y, float *inverse, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (n * w > 16384) schedule(static)
    for (int64_t r = 0; r < n; r++) {
        const float *from = x + r * w;
        float *to = y + r * w, factor = 1.0f / __builtin_sqrtf(dot(from, from, w) / (float)w + eps);
        inverse[r] = factor;
        for (int64_t i = 0; i < w; i++) to[i] = from[i] * factor * weight[i];
    }
}

/* Sum of a * b * c. */
static float dot3(const float *a, const float *b, const float *c, int64_t n) {
    Floats s = {0}, t = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        s += load(a + i) * load(b + i) * load(c + i);
        t += load(a + i + LANES) * load(b + i + LANES) * load(c + i + LANES);
    }
    float sum = total(s + t);
    for (; i < n; i++) sum += a[i] * b[i] * c[i];
    return sum;
}

/* blocks: [ceil(n / BLOCK), w], the parts of the weight's gradient, or NULL where nobody asks for it. */
void groundup_norm_back(int64_t n, int64_t w, const float *grad, const float *x, const float *weight, const float *inverse, float *for_x,
                        float *blocks, float *for_weight, int64_t threads) {
    int64_t count = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads((int)threads) if (n * w > 16384)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < count; b++) {
            float *part = blocks ? blocks + b * w : 0;
            if (part) for (int64_t i = 0; i < w; i++) part[i] = 0;
            for (int64_t r = b * BLOCK; r < n && r < (b + 1) * BLOCK; r++) {
                const float *g = grad + r * w, *from = x + r * w;
                float *to = for_x + r * w, factor = inverse[r];
                float along = dot3(g, weight, from, w) * factor * factor / (float)w;
                for (int64_t i = 0; i < w; i++) to[i] = factor * (g[i] * weight[i] - from[i] * along);
                if (part) for (int64_t i = 0; i < w; i++) part[i] += g[i] * from[i] * factor;
            }
        }
        if (blocks) {
#pragma omp for schedule(static)
            for (int64_t begin = 0; begin < w; begin += 16) {
                int64_t end = begin + 16 < w ? begin + 16 : w;
                for (int64_t i = begin; i < end; i++) for_weight[i] = 0;
                for (int64_t b = 0; b < count; b++) {
                    for (int64_t i = begin; i < end; i++) for_weight[i] += blocks[b * w + i];
                }
            }
        }
    }
}

/* A vector, or what is left of one and `rest` in the other places. */
INLINE Floats in(const float *p, int64_t count, float rest) {
    if (count >= LANES) return load(p);
    Floats v = all(rest);
    for (int64_t l = 0; l < count; l++) v[l] = p[l];
    return v;
}
INLINE void out(float *p, Floats v, int64_t count) {
    if (count >= LANES) store(p, v);
    else for (int64_t l = 0; l < count; l++) p[l] = v[l];
}

INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

/* y = gate * sigmoid(gate) * up. */
void groundup_swiglu(int64_t n, const float *gate, const float *up, float *y, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (n > 8192) schedule(static)
    for (int64_t begin = 0; begin < n; begin += PIECE) {
        int64_t end = begin + PIECE < n ? begin + PIECE : n;
        for (int64_t i = begin; i < end; i += LANES) {
            Floats g = in(gate + i, end - i, 0);
            out(y + i, g * sigmoid(g) * in(up + i, end - i, 0), end - i);
        }
    }
}

void groundup_swiglu_back(int64_t n, const float *grad, const float *gate, const float *up, float *for_gate, float *for_up, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (n > 8192) schedule(static)
    for (int64_t begin = 0; begin < n; begin += PIECE) {
        int64_t end = begin + PIECE < n ? begin + PIECE : n;
        for (int64_t i = begin; i < end; i += LANES) {
            Floats d = in(grad + i, end - i, 0), g = in(gate + i, end - i, 0), s = sigmoid(g);
            out(for_gate + i, d * in(up + i, end - i, 0) * s * (1.0f + g * (1.0f - s)), end - i);
            out(for_up + i, d * g * s, end - i);
        }
    }
}

typedef struct {
    int64_t batch, head, token; /* numbers from one to the next; those of a head lie side by side */
} Strides;

/* Each head's halves (a, b) turned by the position's angle: (a cos - b sin, b cos + a sin); `way` -1 turns back, 0 only copies. cos and sin:
   [rows, t, half] with rows 1 or b. */
void groundup_turn(int64_t b, int64_t heads, int64_t t, int64_t half, const float *x, const Strides *from, const float *cos, const float *sin,
                   int64_t rows, int64_t way, float *y, const Strides *to, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (b * heads * t * half > 8192) schedule(static)
    for (int64_t unit = 0; unit < b * t; unit++) {
        int64_t row = unit / t, at = unit % t;
        const float *c = cos + ((rows == 1 ? 0 : row) * t + at) * half, *s = sin + ((rows == 1 ? 0 : row) * t + at) * half;
        for (int64_t h = 0; h < heads; h++) {
            const float *first = x + row * from->batch + h * from->head + at * from->token;
            float *turned = y + row * to->batch + h * to->head + at * to->token;
            if (way == 0) for (int64_t i = 0; i < 2 * half; i++) turned[i] = first[i];
            else if (way > 0) {
                for (int64_t i = 0; i < half; i++) turned[i] = first[i] * c[i] - first[i + half] * s[i];
                for (int64_t i = 0; i < half; i++) turned[i + half] = first[i + half] * c[i] + first[i] * s[i];
            } else {
                for (int64_t i = 0; i < half; i++) turned[i] = first[i] * c[i] + first[i + half] * s[i];
                for (int64_t i = 0; i < half; i++) turned[i + half] = first[i + half] * c[i] - first[i] * s[i];
            }
        }
    }
}

INLINE float largest(Floats v) { /* a NaN goes on through its own number */
    float most = v[0];
    for (int l = 1; l < LANES; l++) most = v[l] > most ? v[l] : most;
    return most;
}

/* e^(x - most), 0 where that is nothing; NaN stays. */
INLINE Floats share(Floats x, float most) {
    x -= most;
    return (Floats)((Ints)exponential(x) & ~(x < all(-87)));
}

/* scale * s + add of LANES keys; -inf behind those that are seen. */
INLINE Floats score(const float *s, const float *add, float scale, int64_t i, int64_t seen, int64_t t) {
    Floats x = in(s + i, t - i, 0) * scale;
    if (add) x += in(add + i, t - i, 0);
    if (seen - i < LANES) {
        Ints order;
        UNROLL for (int l = 0; l < LANES; l++) order[l] = l;
        Ints behind = order >= (int32_t)(seen - i);
        x = (Floats)((~behind & (Ints)x) | (behind & (Ints)all(-__builtin_inff())));
    }
    return x;
}

/* scores [rows, t] of queries in order, rows / b of each sequence, become softmax(scale * scores + bias). bias: [biases, t, t] with biases 1 or b; without
   it a query sees itself and what is before it. */
void groundup_softmax(int64_t b, int64_t rows, int64_t t, float *scores, float scale, const float *bias, int64_t biases, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (rows * t > 8192) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        int64_t query = r % t, seen = bias ? t : query + 1;
        float *s = scores + r * t;
        const float *add = bias ? bias + ((biases == 1 ? 0 : r / (rows / b)) * t + query) * t : 0;
        Floats most = all(-__builtin_inff()), sum = {0};
        for (int64_t i = 0; i < seen; i += LANES) most = larger(most, score(s, add, scale, i, seen, t));
        float top = largest(most);
        for (int64_t i = 0; i < seen; i += LANES) {
            Floats p = share(score(s, add, scale, i, seen, t), top);
            out(s + i, p, t - i);
            sum += p;
        }
        float factor = 1.0f / total(sum);
        for (int64_t i = 0; i < seen; i += LANES) out(s + i, in(s + i, t - i, 0) * factor, t - i);
        for (int64_t i = (seen + LANES - 1) / LANES * LANES; i < t; i++) s[i] = 0;
    }
}

/* grad [rows, t] of the probabilities p becomes that of the scores. causal: p is zero behind the query. */
void groundup_softmax_back(int64_t rows, int64_t t, const float *p, float *grad, float scale, int64_t causal, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (rows * t > 8192) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        int64_t seen = causal ? r % t + 1 : t;
        const float *q = p + r * t;
        float *g = grad + r * t, along = dot(q, g, seen);
        for (int64_t i = 0; i < seen; i++) g[i] = q[i] * (g[i] - along) * scale;
        for (int64_t i = seen; i < t; i++) g[i] = 0;
    }
}

/* loss[r] = log Z - logits[r, target] + z * (log Z)²; with `back` the logits become its gradient. */
void groundup_cross_entropy(int64_t n, int64_t v, float *logits, const int64_t *targets, float z, float *loss, int64_t back, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (n * v > 8192) schedule(static)
    for (int64_t r = 0; r < n; r++) {
        float *x = logits + r * v, right = x[targets[r]];
        Floats most = all(-__builtin_inff());
        for (int64_t i = 0; i < v; i += LANES) most = larger(most, in(x + i, v - i, x[i]));
        float top = largest(most), whole = 0;
        for (int64_t begin = 0; begin < v; begin += PIECE) { /* a long sum in one number would lose its last digits */
            int64_t end = begin + PIECE < v ? begin + PIECE : v;
            Floats sum = {0};
            for (int64_t i = begin; i < end; i += LANES) {
                Floats p = share(in(x + i, end - i, -__builtin_inff()), top);
                if (back) out(x + i, p, end - i);
                sum += p;
            }
            whole += total(sum);
        }
        float log_z = top + logf(whole);
        loss[r] = logf(whole) - (right - top) + z * log_z * log_z;
        if (back) {
            float factor = (1.0f + 2.0f * z * log_z) / whole;
            for (int64_t i = 0; i < v; i++) x[i] *= factor;
            x[targets[r]] -= 1.0f;
        }
    }
}
