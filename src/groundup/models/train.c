/* Passes over the activations of a training on a CPU, each of which torch makes of several operations. models/fused.py calls them.

   A row is always computed in one order, whatever the number of rows and threads; so are sums over rows, which are made of blocks of fixed size. */

#define WIDE
#include "vectors.h"

float logf(float);
int omp_get_thread_num(void);

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

/* x at the places from `begin` to `end`, -inf elsewhere; the first of x is at i. */
INLINE Floats inside(Floats x, int64_t i, int64_t begin, int64_t end) {
    if (i >= begin && i + LANES <= end) return x;
    Ints order;
    UNROLL for (int l = 0; l < LANES; l++) order[l] = l;
    Ints away = (order < (int32_t)(begin - i)) | (order >= (int32_t)(end - i));
    return (Floats)((~away & (Ints)x) | (away & (Ints)all(-__builtin_inff())));
}

/* scale * s + add of LANES keys; -inf behind those that are seen. */
INLINE Floats score(const float *s, const float *add, float scale, int64_t i, int64_t seen, int64_t t) {
    Floats x = in(s + i, t - i, 0) * scale;
    if (add) x += in(add + i, t - i, 0);
    return inside(x, i, 0, seen);
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

/* -- attention --------------------------------------------------------------------------------------------------------------- */
/* Query i of a sequence sees the keys first[i] .. i, with first never falling. All probabilities of WIDTH queries stand at once, those of one head
   are made by one thread: q, k, v and their gradients are [B, heads, t, d], y and its gradient [B, t, heads, d]; d is a multiple of WIDTH. */
enum { WIDTH = 32, VECTORS = WIDTH / LANES }; /* keys of a panel, queries of a block */
#if defined(__AVX512F__)
enum { TALL = 8 };
#elif defined(__AVX__) || defined(__aarch64__)
enum { TALL = 2 };
#else
enum { TALL = 1 };
#endif

/* c[rows][WIDTH] (+)= sum over k of a(row, k) * b[k][WIDTH]. */
INLINE void tile(const int rows, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t ldb, int64_t n, float *c, int64_t ldc, int add) {
    Floats s[TALL * VECTORS];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int j = 0; j < VECTORS; j++) s[r * VECTORS + j] = add ? load(c + r * ldc + j * LANES) : all(0);
    }
    for (int64_t k = 0; k < n; k++) {
        Floats w[VECTORS];
        UNROLL for (int j = 0; j < VECTORS; j++) w[j] = load(b + k * ldb + j * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            UNROLL for (int j = 0; j < VECTORS; j++) s[r * VECTORS + j] += a[r * a_row + k * a_step] * w[j];
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int j = 0; j < VECTORS; j++) store(c + r * ldc + j * LANES, s[r * VECTORS + j]);
    }
}

static void product(int64_t rows, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t ldb, int64_t n, float *c, int64_t ldc, int add) {
    int64_t r = 0;
    for (; r + TALL <= rows; r += TALL) tile(TALL, a + r * a_row, a_row, a_step, b, ldb, n, c + r * ldc, ldc, add);
    for (; r < rows; r++) tile(1, a + r * a_row, a_row, a_step, b, ldb, n, c + r * ldc, ldc, add);
}

/* [t, d] as panels of WIDTH rows: [t / WIDTH][d][WIDTH], zero behind the end. */
static void pack(const float *x, int64_t t, int64_t d, float *to) {
    for (int64_t p = 0; p < t; p += WIDTH, to += d * WIDTH) {
        for (int64_t l = 0; l < WIDTH; l++) {
            for (int64_t i = 0; i < d; i++) to[i * WIDTH + l] = p + l < t ? x[(p + l) * d + i] : 0;
        }
    }
}

/* scores [rows][.] of the queries with the keys of the panels from `low` to `high`. */
static void against(const float *x, int64_t ld, int64_t rows, const float *panels, int64_t d, int64_t low, int64_t high, float *scores, int64_t stride) {
    for (int64_t p = low; p < high; p += WIDTH) product(rows, x, ld, 1, panels + p * d, WIDTH, d, scores + p - low, stride, 0);
}

static int64_t round_up(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

/* Floats of working memory of each thread. */
static int64_t scratch_of(int64_t t, int64_t d) { return 2 * round_up(t) * (d + WIDTH); }

void groundup_attend(int64_t b, int64_t heads, int64_t kv, int64_t t, int64_t d, const float *q, const float *k, const float *v, const int64_t *first,
                     int64_t firsts, float scale, float *y, float *log_sums, float *scratch, int64_t threads) {
    int64_t size = scratch_of(t, d), group = heads / kv;
#pragma omp parallel for num_threads((int)threads) if (b * heads * t * t * d > 100000) schedule(dynamic)
    for (int64_t unit = 0; unit < b * heads; unit++) {
        int64_t row = unit / heads, head = unit % heads, pair = row * kv + head / group;
        const float *queries = q + unit * t * d, *values = v + pair * t * d;
        const int64_t *from = first + (firsts == 1 ? 0 : row) * t;
        float *panels = scratch + omp_get_thread_num() * size, *p = panels + round_up(t) * d;
        pack(k + pair * t * d, t, d, panels);
        for (int64_t i = 0; i < t; i += WIDTH) {
            int64_t end = i + WIDTH < t ? i + WIDTH : t, low = from[i] / WIDTH * WIDTH, high = round_up(end), stride = high - low;
            against(queries + i * d, d, end - i, panels, d, low, high, p, stride);
            for (int64_t r = i; r < end; r++) {
                float *s = p + (r - i) * stride - low; /* s[key] */
                int64_t begin = from[r] / LANES * LANES, close = r + 1;
                Floats most = all(-__builtin_inff()), sum = {0};
                for (int64_t j = begin; j < close; j += LANES) most = larger(most, inside(load(s + j) * scale, j, from[r], close));
                float top = largest(most);
                for (int64_t j = low; j < begin; j++) s[j] = 0;
                int64_t j = begin;
                for (; j < close; j += LANES) {
                    Floats e = share(inside(load(s + j) * scale, j, from[r], close), top);
                    store(s + j, e);
                    sum += e;
                }
                for (; j < high; j++) s[j] = 0;
                float whole = total(sum);
                log_sums[unit * t + r] = top + logf(whole);
                for (j = begin; j < close; j += LANES) store(s + j, load(s + j) * (1.0f / whole));
            }
            for (int64_t r = i; r < end; r += TALL) {
                int64_t rows = r + TALL < end ? TALL : end - r, begin = from[r];
                for (int64_t c = 0; c < d; c += WIDTH) {
                    product(rows, p + (r - i) * stride + begin - low, stride, 1, values + begin * d + c, d, r + rows - begin,
                            y + ((row * t + r) * heads + head) * d + c, heads * d, 0);
                }
            }
        }
    }
}

/* for_k, for_v: [B, heads, t, d], what each head of queries gives. */
void groundup_attend_back(int64_t b, int64_t heads, int64_t kv, int64_t t, int64_t d, const float *q, const float *k, const float *v, const int64_t *first,
                          int64_t firsts, float scale, const float *y, const float *grad, const float *log_sums, float *for_q, float *for_k, float *for_v,
                          float *scratch, int64_t threads) {
    int64_t size = scratch_of(t, d), group = heads / kv;
#pragma omp parallel for num_threads((int)threads) if (b * heads * t * t * d > 50000) schedule(dynamic)
    for (int64_t unit = 0; unit < b * heads; unit++) {
        int64_t row = unit / heads, head = unit % heads, pair = row * kv + head / group;
        const float *queries = q + unit * t * d, *keys = k + pair * t * d;
        const float *outs = y + (row * t * heads + head) * d, *grads = grad + (row * t * heads + head) * d;
        const int64_t *from = first + (firsts == 1 ? 0 : row) * t;
        float *k_panels = scratch + omp_get_thread_num() * size, *v_panels = k_panels + round_up(t) * d, *p = v_panels + round_up(t) * d;
        float *ds = p + round_up(t) * WIDTH, *for_keys = for_k + unit * t * d, *for_values = for_v + unit * t * d;
        pack(keys, t, d, k_panels);
        pack(v + pair * t * d, t, d, v_panels);
        for (int64_t i = 0; i < t * d; i++) for_keys[i] = for_values[i] = 0;
        for (int64_t i = 0; i < t; i += WIDTH) {
            int64_t end = i + WIDTH < t ? i + WIDTH : t, low = from[i] / WIDTH * WIDTH, high = round_up(end), stride = high - low;
            against(queries + i * d, d, end - i, k_panels, d, low, high, p, stride);
            against(grads + i * heads * d, heads * d, end - i, v_panels, d, low, high, ds, stride);
            for (int64_t r = i; r < end; r++) {
                float *s = p + (r - i) * stride - low, *g = ds + (r - i) * stride - low, log_sum = log_sums[unit * t + r];
                float along = dot(outs + r * heads * d, grads + r * heads * d, d);
                int64_t begin = from[r] / LANES * LANES, j = low;
                for (; j < begin; j++) s[j] = g[j] = 0;
                for (; j < r + 1; j += LANES) {
                    Floats e = share(inside(load(s + j) * scale, j, from[r], r + 1), log_sum);
                    store(s + j, e);
                    store(g + j, e * (load(g + j) - along) * scale);
                }
                for (; j < high; j++) s[j] = g[j] = 0;
            }
            for (int64_t c = 0; c < d; c += WIDTH) {
                for (int64_t r = i; r < end; r += TALL) {
                    int64_t rows = r + TALL < end ? TALL : end - r, begin = from[r];
                    product(rows, ds + (r - i) * stride + begin - low, stride, 1, keys + begin * d + c, d, r + rows - begin,
                            for_q + (unit * t + r) * d + c, d, 0);
                }
                product(end - low, ds, 1, stride, queries + i * d + c, d, end - i, for_keys + low * d + c, d, 1);
                product(end - low, p, 1, stride, grads + i * heads * d + c, heads * d, end - i, for_values + low * d + c, d, 1);
            }
        }
    }
}
