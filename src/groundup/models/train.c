/* Passes over the activations of a training on a CPU, each of which torch makes of several operations. models/fused.py calls them.

   A row is always computed in one order, whatever the number of rows and threads; so are sums over rows, which are made of blocks of fixed size, but in
   whole layers of one part for each thread. */

#define WIDE
#include "vectors.h"

float logf(float);
double pow(double, double);
int omp_get_thread_num(void), omp_get_num_threads(void);

enum { BLOCK = 64 };   /* rows that a thread takes, and sums, at once */
enum { PIECE = 2048 }; /* numbers of one unit of work where there are no rows */

static void inverses(int64_t n, int64_t w, float eps, const float *x, float *inverse) {
    for (int64_t r = 0; r < n; r++) inverse[r] = 1.0f / __builtin_sqrtf(dot(x + r * w, x + r * w, w) / (float)w + eps);
}

static void normed(int64_t n, int64_t w, const float *x, const float *weight, const float *inverse, float *y) {
    for (int64_t r = 0; r < n; r++) {
        for (int64_t i = 0; i < w; i++) y[r * w + i] = x[r * w + i] * inverse[r] * weight[i];
    }
}

/* y = x * inverse * weight with inverse = 1 / sqrt(mean(x²) + eps); rows of w numbers. */
void groundup_norm(int64_t n, int64_t w, float eps, const float *x, const float *weight, float *y, float *inverse, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (n * w > 16384) schedule(static)
    for (int64_t r = 0; r < n; r++) {
        inverses(1, w, eps, x + r * w, inverse + r);
        normed(1, w, x + r * w, weight, inverse + r, y + r * w);
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

/* One row: to = base + the gradient through a norm; part (+)= the gradient of its weight. */
INLINE void norm_back(int64_t w, const float *g, const float *x, const float *weight, float inverse, const float *base, float *to, float *part) {
    float along = dot3(g, weight, x, w) * inverse * inverse / (float)w;
    if (part) for (int64_t i = 0; i < w; i++) part[i] += g[i] * x[i] * inverse;
    for (int64_t i = 0; i < w; i++) to[i] = (base ? base[i] : 0) + inverse * (g[i] * weight[i] - x[i] * along);
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
            for (int64_t r = b * BLOCK; r < n && r < (b + 1) * BLOCK; r++) norm_back(w, grad + r * w, x + r * w, weight, inverse[r], 0, for_x + r * w, part);
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

/* A head's halves (a, b) become (a cos - b sin, b cos + a sin); `way` -1 turns back. */
INLINE void turn(int64_t half, const float *x, const float *c, const float *s, float way, float *y) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        y[i] = a * c[i] - way * b * s[i];
        y[i + half] = b * c[i] + way * a * s[i];
    }
}

/* Each head turned by its position's angle; `way` 0 only copies. cos and sin: [rows, t, half] with rows 1 or b. */
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
            else turn(half, first, c, s, (float)way, turned);
        }
    }
}

INLINE float largest(Floats v) {
    UNROLL for (int by = LANES / 2; by; by /= 2) v = larger(v, crossed(v, by));
    return v[0];
}

/* e^(x - most), 0 where that is nothing; NaN stays. */
INLINE Floats share(Floats x, Floats most) {
    x -= most;
    return (Floats)((Ints)exponential(x) & ~(x < all(-87)));
}

/* x at the places before `end`, -inf behind; the first of x is at i. */
INLINE Floats inside(Floats x, int64_t i, int64_t end) {
    if (i + LANES <= end) return x;
    Ints order;
    UNROLL for (int l = 0; l < LANES; l++) order[l] = l;
    Ints away = order >= (int32_t)(end - i);
    return (Floats)((~away & (Ints)x) | (away & (Ints)all(-__builtin_inff())));
}

/* scale * s + add of LANES keys; -inf behind those that are seen. */
INLINE Floats biased(const float *s, const float *add, float scale, int64_t i, int64_t seen, int64_t t) {
    Floats x = in(s + i, t - i, 0) * scale;
    if (add) x += in(add + i, t - i, 0);
    return inside(x, i, seen);
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
        for (int64_t i = 0; i < seen; i += LANES) most = larger(most, biased(s, add, scale, i, seen, t));
        float top = largest(most);
        for (int64_t i = 0; i < seen; i += LANES) {
            Floats p = share(biased(s, add, scale, i, seen, t), all(top));
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

/* log Z - x[target] + z * (log Z)² of one row of logits, which with `back` become its gradient. */
static float entropy(int64_t v, float *x, int64_t target, float z, int64_t back) {
    float right = x[target];
    Floats most = all(-__builtin_inff());
    for (int64_t i = 0; i < v; i += LANES) most = larger(most, in(x + i, v - i, x[i]));
    float top = largest(most), whole = 0;
    for (int64_t begin = 0; begin < v; begin += PIECE) { /* a long sum in one number would lose its last digits */
        int64_t end = begin + PIECE < v ? begin + PIECE : v;
        Floats sum = {0};
        for (int64_t i = begin; i < end; i += LANES) {
            Floats p = share(in(x + i, end - i, -__builtin_inff()), all(top));
            if (back) out(x + i, p, end - i);
            sum += p;
        }
        whole += total(sum);
    }
    float log_z = top + logf(whole);
    if (back) {
        float factor = (1.0f + 2.0f * z * log_z) / whole;
        for (int64_t i = 0; i < v; i++) x[i] *= factor;
        x[target] -= 1.0f;
    }
    return logf(whole) - (right - top) + z * log_z * log_z;
}

void groundup_cross_entropy(int64_t n, int64_t v, float *logits, const int64_t *targets, float z, float *loss, int64_t back, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (n * v > 8192) schedule(static)
    for (int64_t r = 0; r < n; r++) loss[r] = entropy(v, logits + r * v, targets[r], z, back);
}

/* -- matrix products ---------------------------------------------------------------------------------------------------------- */
enum { PANEL = 2 * LANES, DEEP = 256 }; /* columns and most rows of a panel of the second factor, which stays in the nearest cache */
#if defined(__AVX512F__) || defined(__aarch64__)
enum { TALL = 8 };
#else
enum { TALL = 4 };
#endif

/* c[rows][PANEL] = from (0 where it is NULL) + the sum over k of a(row, k) * b[k][PANEL]; each number is summed in the order of k, whatever stands beside it. */
INLINE void tile(const int rows, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t ldb, int64_t n, const float *from, float *c, int64_t ldc) {
    Floats s[TALL], u[TALL];
    UNROLL for (int r = 0; r < rows; r++) {
        s[r] = from ? load(from + r * ldc) : all(0);
        u[r] = from ? load(from + r * ldc + LANES) : all(0);
    }
    for (int64_t k = 0; k < n; k++) {
        Floats w = load(b + k * ldb), z = load(b + k * ldb + LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            Floats x = all(a[r * a_row + k * a_step]);
            s[r] += x * w;
            u[r] += x * z;
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        store(c + r * ldc, s[r]);
        store(c + r * ldc + LANES, u[r]);
    }
}

static void product(int64_t rows, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t ldb, int64_t n, const float *from, float *c, int64_t ldc) {
    int64_t r = 0, step = from ? ldc : 0;
    if (a_step == 1) for (; r + TALL <= rows; r += TALL) tile(TALL, a + r * a_row, a_row, 1, b, ldb, n, from + r * step, c + r * ldc, ldc);
    else if (a_row == 1) for (; r + TALL <= rows; r += TALL) tile(TALL, a + r, 1, a_step, b, ldb, n, from + r * step, c + r * ldc, ldc);
    for (; r + 4 <= rows; r += 4) tile(4, a + r * a_row, a_row, a_step, b, ldb, n, from + r * step, c + r * ldc, ldc);
    for (; r < rows; r++) tile(1, a + r * a_row, a_row, a_step, b, ldb, n, from + r * step, c + r * ldc, ldc);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* y[rows][n] = from (0 where it is NULL) + x[rows][depth] times a matrix of panels [n / PANEL][depth][PANEL]. */
static void times(int64_t rows, const float *x, int64_t ldx, int64_t depth, const float *panels, int64_t n, const float *from, float *y, int64_t ldy) {
    for (int64_t k = 0; k < depth; k += DEEP) {
        for (int64_t p = 0; p < n; p += PANEL) {
            const float *begin = k ? y + p : from ? from + p : 0;
            product(rows, x + k, ldx, 1, panels + p * depth + k * PANEL, PANEL, least(DEEP, depth - k), begin, y + p, ldy);
        }
    }
}

/* -- attention --------------------------------------------------------------------------------------------------------------- */
/* Query i of a sequence sees the keys first[i] .. i, with first never falling. The scores of WIDTH queries stand as [keys][WIDTH]: each query has a lane of
   its own. Those of one head are made by one thread; the heads' width d is a multiple of WIDTH. */
enum { WIDTH = 32 }; /* queries of a block */

static int64_t round_up(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

/* Up to PANEL rows of d numbers as the columns of a panel, zero where there is no row; d is a multiple of LANES. */
static void columns(const float *x, int64_t ld, int64_t rows, int64_t d, float *panel) {
    for (int64_t half = 0; half < PANEL; half += LANES) {
        for (int64_t i = 0; i < d; i += LANES) {
            Floats t[LANES];
            UNROLL for (int l = 0; l < LANES; l++) t[l] = half + l < rows ? load(x + (half + l) * ld + i) : all(0);
            transposed(t);
            UNROLL for (int l = 0; l < LANES; l++) store(panel + (i + l) * PANEL + half, t[l]);
        }
    }
}

/* What `count` keys x have to do with up to WIDTH rows y: to[count][WIDTH] = x y', zero where there is no row. */
static void against(const float *x, int64_t ld, int64_t count, const float *y, int64_t ld_y, int64_t rows, int64_t d, float *panel, float *to) {
    for (int64_t p = 0; p < WIDTH; p += PANEL) {
        columns(y + p * ld_y, ld_y, rows - p, d, panel);
        product(count, x, ld, 1, panel, PANEL, d, 0, to + p, WIDTH);
    }
}

/* Floats of working memory of each thread. */
static int64_t scratch_of(int64_t t, int64_t d) { return 2 * t * WIDTH + d * PANEL; }

typedef struct {
    int64_t b, heads, kv, t, d;
    Strides q, k, v, y; /* of queries, keys, values and results, and of their gradients */
    const int64_t *first;
    int64_t firsts; /* sequences that `first` tells apart: 1 or b */
    float scale;
} Attention;

/* LANES queries from `at` on, and the keys that they see. */
typedef struct {
    Ints first, last;
} Sight;

static Sight sight_of(const Attention *a, const int64_t *first, int64_t at) {
    Sight seen;
    for (int l = 0; l < LANES; l++) {
        seen.last[l] = (int32_t)(at + l);
        seen.first[l] = (int32_t)first[least(at + l, a->t - 1)];
    }
    return seen;
}

/* The scores of a key, -inf where it is not seen. */
INLINE Floats score(const float *s, float scale, Sight seen, int64_t key) {
    Ints away = (seen.first > (int32_t)key) | (seen.last < (int32_t)key);
    return (Floats)((~away & (Ints)(load(s) * scale)) | (away & (Ints)all(-__builtin_inff())));
}

/* A thread and how many there are; what it does of n pieces of work lies side by side. */
typedef struct {
    int64_t thread, threads;
} Part;

INLINE int64_t begin_of(Part part, int64_t n) { return n * part.thread / part.threads; }
INLINE int64_t end_of(Part part, int64_t n) { return n * (part.thread + 1) / part.threads; }

/* tops: [b, heads, 2, t rounded up], the largest score of each query and what its exponentials are multiplied with. */
static void attend(const Attention *a, const float *q, const float *k, const float *v, float *y, float *tops, float *scratch, Part part) {
    int64_t t = a->t, d = a->d, whole = round_up(t), group = a->heads / a->kv;
    for (int64_t unit = begin_of(part, a->b * a->heads); unit < end_of(part, a->b * a->heads); unit++) {
        int64_t row = unit / a->heads, head = unit % a->heads;
        const float *queries = q + row * a->q.batch + head * a->q.head;
        const float *keys = k + row * a->k.batch + head / group * a->k.head, *values = v + row * a->v.batch + head / group * a->v.head;
        float *outs = y + row * a->y.batch + head * a->y.head, *top = tops + unit * 2 * whole, *factor = top + whole;
        const int64_t *first = a->first + (a->firsts == 1 ? 0 : row) * t;
        float *p = scratch, *panel = p + 2 * t * WIDTH;
        for (int64_t i = 0; i < t; i += WIDTH) {
            int64_t end = least(i + WIDTH, t), low = first[i];
            against(keys + low * a->k.token, a->k.token, end - low, queries + i * a->q.token, a->q.token, end - i, d, panel, p);
            for (int64_t c = 0; c < WIDTH; c += LANES) {
                int64_t stop = least(i + c + LANES, end);
                float *s = p + c - low * WIDTH; /* those of a key are at s + key * WIDTH */
                Sight seen = sight_of(a, first, i + c);
                Floats most = all(-__builtin_inff()), sum = {0};
                for (int64_t key = low; key < stop; key++) most = larger(most, score(s + key * WIDTH, a->scale, seen, key));
                for (int64_t key = low; key < stop; key++) {
                    Floats e = share(score(s + key * WIDTH, a->scale, seen, key), most);
                    store(s + key * WIDTH, e);
                    sum += e;
                }
                for (int64_t key = stop; key < end; key++) store(s + key * WIDTH, all(0));
                store(top + i + c, most);
                store(factor + i + c, 1.0f / sum);
            }
            for (int64_t c = 0; c < d; c += PANEL) {
                product(end - i, p, 1, WIDTH, values + low * a->v.token + c, a->v.token, end - low, 0, outs + i * a->y.token + c, a->y.token);
            }
            for (int64_t r = i; r < end; r++) for (int64_t c = 0; c < d; c++) outs[r * a->y.token + c] *= factor[r];
        }
    }
}

static void attend_back(const Attention *a, const float *q, const float *k, const float *v, const float *grad, const float *tops, float *for_q,
                        float *for_k, float *for_v, float *scratch, Part part) {
    int64_t t = a->t, d = a->d, whole = round_up(t), group = a->heads / a->kv;
    for (int64_t unit = begin_of(part, a->b * a->kv); unit < end_of(part, a->b * a->kv); unit++) { /* all heads of a group, whose keys and values are the same */
        int64_t row = unit / a->kv, pair = unit % a->kv;
        int64_t at_keys = row * a->k.batch + pair * a->k.head, at_values = row * a->v.batch + pair * a->v.head;
        const float *keys = k + at_keys, *values = v + at_values;
        float *for_keys = for_k + at_keys, *for_values = for_v + at_values;
        const int64_t *first = a->first + (a->firsts == 1 ? 0 : row) * t;
        float *p = scratch, *ds = p + t * WIDTH, *panel = ds + t * WIDTH;
        for (int64_t r = 0; r < t; r++) {
            for (int64_t i = 0; i < d; i++) for_keys[r * a->k.token + i] = for_values[r * a->v.token + i] = 0;
        }
        for (int64_t head = pair * group; head < (pair + 1) * group; head++) {
            int64_t at_queries = row * a->q.batch + head * a->q.head;
            const float *queries = q + at_queries, *grads = grad + row * a->y.batch + head * a->y.head;
            const float *top = tops + (row * a->heads + head) * 2 * whole, *factor = top + whole;
            for (int64_t i = 0; i < t; i += WIDTH) {
                int64_t end = least(i + WIDTH, t), low = first[i];
                against(keys + low * a->k.token, a->k.token, end - low, queries + i * a->q.token, a->q.token, end - i, d, panel, p);
                against(values + low * a->v.token, a->v.token, end - low, grads + i * a->y.token, a->y.token, end - i, d, panel, ds);
                for (int64_t c = 0; c < WIDTH; c += LANES) {
                    int64_t stop = least(i + c + LANES, end);
                    float *s = p + c - low * WIDTH, *g = ds + c - low * WIDTH;
                    Sight seen = sight_of(a, first, i + c);
                    Floats most = load(top + i + c), times = load(factor + i + c), along = {0};
                    for (int64_t key = low; key < stop; key++) {
                        Floats e = share(score(s + key * WIDTH, a->scale, seen, key), most) * times;
                        store(s + key * WIDTH, e);
                        along += e * load(g + key * WIDTH);
                    }
                    for (int64_t key = low; key < stop; key++) {
                        store(g + key * WIDTH, load(s + key * WIDTH) * (load(g + key * WIDTH) - along) * a->scale);
                    }
                    for (int64_t key = stop; key < end; key++) {
                        store(s + key * WIDTH, all(0));
                        store(g + key * WIDTH, all(0));
                    }
                }
                for (int64_t c = 0; c < d; c += PANEL) {
                    float *to_q = for_q + at_queries + i * a->q.token + c, *to_k = for_keys + low * a->k.token + c, *to_v = for_values + low * a->v.token + c;
                    product(end - i, ds, 1, WIDTH, keys + low * a->k.token + c, a->k.token, end - low, 0, to_q, a->q.token);
                    product(end - low, ds, WIDTH, 1, queries + i * a->q.token + c, a->q.token, end - i, to_k, to_k, a->k.token);
                    product(end - low, p, WIDTH, 1, grads + i * a->y.token + c, a->y.token, end - i, to_v, to_v, a->v.token);
                }
            }
        }
    }
}

/* q, k, v and their gradients are [B, heads, t, d], y and its gradient [B, t, heads, d]. */
static Attention of_heads(int64_t b, int64_t heads, int64_t kv, int64_t t, int64_t d, const int64_t *first, int64_t firsts, float scale) {
    Strides of_queries = {heads * t * d, t * d, d}, of_keys = {kv * t * d, t * d, d}, of_outs = {t * heads * d, d, heads * d};
    return (Attention){b, heads, kv, t, d, of_queries, of_keys, of_keys, of_outs, first, firsts, scale};
}

void groundup_attend(int64_t b, int64_t heads, int64_t kv, int64_t t, int64_t d, const float *q, const float *k, const float *v, const int64_t *first,
                     int64_t firsts, float scale, float *y, float *tops, float *scratch, int64_t threads) {
    Attention a = of_heads(b, heads, kv, t, d, first, firsts, scale);
#pragma omp parallel for num_threads((int)threads) if (b * heads * t * t * d > 100000) schedule(static)
    for (int64_t thread = 0; thread < threads; thread++) {
        attend(&a, q, k, v, y, tops, scratch + thread * scratch_of(t, d), (Part){thread, threads});
    }
}

void groundup_attend_back(int64_t b, int64_t heads, int64_t kv, int64_t t, int64_t d, const float *q, const float *k, const float *v, const int64_t *first,
                          int64_t firsts, float scale, const float *grad, const float *tops, float *for_q, float *for_k, float *for_v, float *scratch,
                          int64_t threads) {
    Attention a = of_heads(b, heads, kv, t, d, first, firsts, scale);
#pragma omp parallel for num_threads((int)threads) if (b * heads * t * t * d > 50000) schedule(static)
    for (int64_t thread = 0; thread < threads; thread++) {
        attend_back(&a, q, k, v, grad, tops, for_q, for_k, for_v, scratch + thread * scratch_of(t, d), (Part){thread, threads});
    }
}

/* -- a layer of the decoder ---------------------------------------------------------------------------------------------------- */
/* x + attention(norm(x)), then x + mlp(norm(x)), as one pass over blocks of tokens: what lies between two products stays in a thread's cache. All widths
   are multiples of WIDTH. Matrices are [outputs][inputs]; several that read the same input stand side by side in the products. */
typedef struct {
    int64_t b, t, width, heads, kv, d, hidden, firsts, angles; /* angles: sequences that cos and sin tell apart, 1 or b */
    float eps;
    const int64_t *first;
    const float *cos, *sin; /* [angles, t, d / 2] */
    const float *norm, *q, *k, *v, *q_norm, *k_norm, *o, *second_norm, *gate, *up, *down;
} Layer;

/* The gradients of a layer's weights, NULL for those that are not trained. */
enum { NORM, Q, K, V, Q_NORM, K_NORM, O, SECOND_NORM, GATE, UP, DOWN, WEIGHTS };
typedef struct {
    float *of[WEIGHTS];
} Gradients;

static int64_t queries_of(const Layer *l) { return l->heads * l->d; }
static int64_t keys_of(const Layer *l) { return l->kv * l->d; }
static int64_t qkv_of(const Layer *l) { return queries_of(l) + 2 * keys_of(l); }
static int64_t matrices_of(const Layer *l) { return l->width * (qkv_of(l) + queries_of(l) + 3 * l->hidden); }

/* What the backward pass needs, in one array: [tokens][queries, keys, values] as the products give them, and with norms and positions (the same place
   without norms); what attention gives, and of each query its `tops`; x + attention; gate and up; both norms' factors. */
typedef struct {
    float *raw, *turned, *attended, *tops, *middle, *gate_up, *inverse, *second_inverse, *end;
} Kept;

static Kept kept_in(const Layer *l, float *at) {
    int64_t tokens = l->b * l->t;
    Kept kept = {.raw = at};
    kept.turned = kept.raw + (l->q_norm ? tokens * qkv_of(l) : 0);
    kept.attended = kept.turned + tokens * qkv_of(l);
    kept.tops = kept.attended + tokens * queries_of(l);
    kept.middle = kept.tops + l->b * l->heads * 2 * round_up(l->t);
    kept.gate_up = kept.middle + tokens * l->width;
    kept.inverse = kept.gate_up + tokens * 2 * l->hidden;
    kept.second_inverse = kept.inverse + tokens;
    kept.end = kept.second_inverse + tokens;
    return kept;
}

int64_t groundup_layer_kept(const Layer *l) { return kept_in(l, 0).end - (float *)0; }

enum { MATRICES = 7 };

static void sizes_of(const Layer *l, int64_t *sizes) {
    int64_t w = l->width, q = queries_of(l), kv = keys_of(l), norm = l->q_norm ? l->d : 0;
    int64_t found[] = {w, w * q, w * kv, w * kv, norm, norm, w * q, w, w * l->hidden, w * l->hidden, w * l->hidden};
    for (int i = 0; i < WEIGHTS; i++) sizes[i] = found[i];
}

static int64_t weights_of(const Layer *l) {
    int64_t sizes[WEIGHTS], sum = 0;
    sizes_of(l, sizes);
    for (int i = 0; i < WEIGHTS; i++) sum += sizes[i];
    return sum;
}

/* Floats of a thread's working memory, and the place behind all that going back needs but `parts`: what each thread but the first finds of the weights'
   gradients. */
static int64_t each_of(const Layer *l, int64_t back) {
    return BLOCK * (back ? 2 * l->width + 4 * l->hidden : l->width + l->hidden) + scratch_of(l->t, l->d);
}
static float *parts_in(const Layer *l, float *scratch, int64_t threads) {
    return scratch + matrices_of(l) + l->b * l->t * (l->width + queries_of(l) + qkv_of(l)) + threads * each_of(l, 1);
}

/* Floats of working memory: the matrices as panels, and all that. */
int64_t groundup_layer_scratch(const Layer *l, int64_t back, int64_t threads) {
    if (back) return parts_in(l, 0, threads) + (threads - 1) * weights_of(l) - (float *)0;
    return matrices_of(l) + threads * each_of(l, 0);
}

typedef struct {
    const float *w;
    int64_t outputs, inputs;
    float *to; /* panels of `depth` rows, this matrix's from `at` on where the products are x W */
    int64_t at, depth;
} Laid;

/* Matrices as panels. For y = x W' rows become columns; for y = x W (`turned`) they stay rows, of which several matrices make one. */
static void lay(const Laid *all, int64_t count, int turned, Part part) {
    int64_t units[MATRICES + 1] = {0}, m = 0;
    for (int64_t i = 0; i < count; i++) units[i + 1] = units[i] + ((turned ? all[i].inputs : all[i].outputs) + PANEL - 1) / PANEL;
    for (int64_t unit = begin_of(part, units[count]); unit < end_of(part, units[count]); unit++) {
        while (unit >= units[m + 1]) m++;
        int64_t p = (unit - units[m]) * PANEL, inputs = all[m].inputs;
        const float *w = all[m].w + p * (turned ? 1 : inputs);
        float *to = all[m].to + p * (turned ? all[m].depth : inputs) + all[m].at * PANEL;
        if (turned) for (int64_t i = 0; i < all[m].outputs; i++) {
            store(to + i * PANEL, load(w + i * inputs));
            store(to + i * PANEL + LANES, load(w + i * inputs + LANES));
        }
        else columns(w, inputs, all[m].outputs - p, inputs, to);
    }
}

static Attention of_layer(const Layer *l) {
    int64_t q = queries_of(l), all = qkv_of(l);
    Strides in = {l->t * all, l->d, all}, outs = {l->t * q, l->d, q};
    return (Attention){l->b, l->heads, l->kv, l->t, l->d, in, in, in, outs, l->first, l->firsts, 1.0f / __builtin_sqrtf((float)l->d)};
}

INLINE int64_t angle_of(const Layer *l, int64_t token) { return (l->angles == 1 ? token % l->t : token) * (l->d / 2); }

/* A thread's tokens: where it can, whole sequences, of which it then has the attention too, so that it need not wait for others in between. */
static int whole_sequences(const Layer *l, Part part) { return l->b % part.threads == 0; }
static int64_t cut_of(const Layer *l, Part part, int64_t at) {
    int64_t tokens = l->b * l->t, blocks = (tokens + BLOCK - 1) / BLOCK;
    return whole_sequences(l, part) ? tokens * at / part.threads : least(blocks * at / part.threads * BLOCK, tokens);
}

/* All threads call it, and each does its part. */
static void layer(const Layer *l, const float *x, float *keep, float *y, float *scratch, Part part) {
    Kept kept = kept_in(l, keep);
    int64_t w = l->width, q = queries_of(l), kv = keys_of(l), all = qkv_of(l), hidden = l->hidden;
    int64_t start = cut_of(l, part, part.thread), stop = cut_of(l, part, part.thread + 1);
    float *panels = scratch, *for_o = panels + all * w, *for_gate = for_o + w * q, *for_down = for_gate + 2 * hidden * w;
    float *block = for_down + w * hidden + part.thread * each_of(l, 0), *act = block + BLOCK * w, *rest = act + BLOCK * hidden;
    Laid matrices[] = {
        {l->q, q, w, panels, 0, w},
        {l->k, kv, w, panels + q * w, 0, w},
        {l->v, kv, w, panels + (q + kv) * w, 0, w},
        {l->o, w, q, for_o, 0, q},
        {l->gate, hidden, w, for_gate, 0, w},
        {l->up, hidden, w, for_gate + hidden * w, 0, w},
        {l->down, w, hidden, for_down, 0, hidden},
    };
#pragma omp barrier
    lay(matrices, MATRICES, 0, part);
#pragma omp barrier
    for (int64_t begin = start; begin < stop; begin += BLOCK) {
        int64_t rows = least(BLOCK, stop - begin);
        float *raw = kept.raw + begin * all;
        inverses(rows, w, l->eps, x + begin * w, kept.inverse + begin);
        normed(rows, w, x + begin * w, l->norm, kept.inverse + begin, block);
        times(rows, block, w, w, panels, all, 0, raw, all);
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = angle_of(l, begin + r);
            for (int64_t h = 0; h < l->heads + l->kv; h++) {
                float *from = raw + r * all + h * l->d, *to = kept.turned + (begin + r) * all + h * l->d, inverse = 1;
                const float *weight = h < l->heads ? l->q_norm : l->k_norm;
                if (weight) {
                    inverses(1, l->d, l->eps, from, &inverse);
                    normed(1, l->d, from, weight, &inverse, to);
                }
                turn(l->d / 2, weight ? to : from, l->cos + at, l->sin + at, 1, to);
            }
        }
    }
    Attention a = of_layer(l);
    if (!whole_sequences(l, part)) {
#pragma omp barrier
    }
    attend(&a, kept.turned, kept.turned + q, kept.raw + q + kv, kept.attended, kept.tops, rest, part);
    if (!whole_sequences(l, part)) {
#pragma omp barrier
    }
    for (int64_t begin = start; begin < stop; begin += BLOCK) {
        int64_t rows = least(BLOCK, stop - begin);
        float *middle = kept.middle + begin * w, *gate_up = kept.gate_up + begin * 2 * hidden;
        times(rows, kept.attended + begin * q, q, q, for_o, w, x + begin * w, middle, w);
        inverses(rows, w, l->eps, middle, kept.second_inverse + begin);
        normed(rows, w, middle, l->second_norm, kept.second_inverse + begin, block);
        times(rows, block, w, w, for_gate, 2 * hidden, 0, gate_up, 2 * hidden);
        for (int64_t r = 0; r < rows; r++) {
            const float *gate = gate_up + r * 2 * hidden;
            for (int64_t i = 0; i < hidden; i += LANES) {
                Floats g = load(gate + i);
                store(act + r * hidden + i, g * sigmoid(g) * load(gate + hidden + i));
            }
        }
        times(rows, act, hidden, hidden, for_down, w, middle, y + begin * w, w);
    }
}

/* to [outputs][inputs] (+)= grad' x over a block of tokens: grad [rows][outputs], x [rows][inputs]. */
static void outer(int64_t rows, const float *grad, int64_t ld_grad, int64_t outputs, const float *x, int64_t ld_x, int64_t inputs, float *to, int add) {
    for (int64_t p = 0; to && p < inputs; p += PANEL) product(outputs, grad, 1, ld_grad, x + p, ld_x, rows, add ? to + p : 0, to + p, inputs);
}

/* What the threads found in their own tokens, added to what the first one found. */
static void gather(int64_t size, float *first, const float *others, int64_t apart, Part part) {
    for (int64_t thread = 0; thread < part.threads - 1; thread++) {
        for (int64_t i = begin_of(part, size); i < end_of(part, size); i++) first[i] += others[thread * apart + i];
    }
}

/* Where a thread writes what it finds of the weights' gradients: the first one to where the sum will be. */
static Gradients own_of(const Layer *l, const Gradients *found, float *parts, int64_t thread) {
    int64_t sizes[WEIGHTS];
    sizes_of(l, sizes);
    if (thread == 0) return *found;
    Gradients own;
    parts += (thread - 1) * weights_of(l);
    for (int i = 0; i < WEIGHTS; parts += sizes[i++]) own.of[i] = found->of[i] ? parts : 0;
    return own;
}

static void gather_layer(const Layer *l, const Gradients *found, float *parts, Part part) {
    int64_t sizes[WEIGHTS];
    sizes_of(l, sizes);
    for (int i = 0; i < WEIGHTS; parts += sizes[i++]) if (found->of[i]) gather(sizes[i], found->of[i], parts, weights_of(l), part);
}

/* grad, that of y, becomes that of x. All threads call it; `parts` holds what they found in the layer behind this one, and then in this one. */
static void layer_back(const Layer *l, const float *x, float *keep, float *grad, const Gradients *found, const Gradients *behind, float *scratch, Part part) {
    int64_t tokens = l->b * l->t, w = l->width, q = queries_of(l), kv = keys_of(l), all = qkv_of(l), hidden = l->hidden, d = l->d;
    int64_t start = cut_of(l, part, part.thread), stop = cut_of(l, part, part.thread + 1), sizes[WEIGHTS];
    Kept kept = kept_in(l, keep);
    float *for_down = scratch, *for_gate = for_down + hidden * w, *for_o = for_gate + 2 * hidden * w, *for_q = for_o + q * w;
    float *for_middle = for_q + all * w, *for_attended = for_middle + tokens * w, *for_qkv = for_attended + tokens * q, *each = for_qkv + tokens * all;
    float *normed_x = each + part.thread * each_of(l, 1), *for_x = normed_x + BLOCK * w, *act = for_x + BLOCK * w, *for_act = act + BLOCK * hidden;
    float *for_gate_up = for_act + BLOCK * hidden, *rest = for_gate_up + BLOCK * 2 * hidden, *parts = parts_in(l, scratch, part.threads);
    Laid matrices[] = {
        {l->down, w, hidden, for_down, 0, w},
        {l->gate, hidden, w, for_gate, 0, 2 * hidden},
        {l->up, hidden, w, for_gate, hidden, 2 * hidden},
        {l->o, w, q, for_o, 0, w},
        {l->q, q, w, for_q, 0, all},
        {l->k, kv, w, for_q, q, all},
        {l->v, kv, w, for_q, q + kv, all},
    };
#pragma omp barrier
    lay(matrices, MATRICES, 1, part);
    if (behind) gather_layer(l + 1, behind, parts, part);
#pragma omp barrier
    Gradients own = own_of(l, found, parts, part.thread);
    float *const *to = own.of;
    const int norms[] = {NORM, SECOND_NORM, Q_NORM, K_NORM};
    sizes_of(l, sizes);
    for (int i = 0; i < 4; i++) if (to[norms[i]]) __builtin_memset(to[norms[i]], 0, sizeof(float) * sizes[norms[i]]);
    for (int64_t begin = start; begin < stop; begin += BLOCK) {
        int64_t rows = least(BLOCK, stop - begin);
        int add = begin > start;
        const float *middle = kept.middle + begin * w, *here = grad + begin * w, *inverse = kept.second_inverse + begin;
        times(rows, here, w, w, for_down, hidden, 0, for_act, hidden);
        for (int64_t r = 0; r < rows; r++) {
            const float *gate = kept.gate_up + (begin + r) * 2 * hidden;
            float *for_gate = for_gate_up + r * 2 * hidden;
            for (int64_t i = 0; i < hidden; i += LANES) {
                __builtin_prefetch(gate + 4 * hidden + i); /* the next row but one, from far away */
                __builtin_prefetch(gate + 5 * hidden + i);
                Floats g = load(gate + i), u = load(gate + hidden + i), s = sigmoid(g), back = load(for_act + r * hidden + i);
                store(act + r * hidden + i, g * s * u);
                store(for_gate + i, back * u * s * (1.0f + g * (1.0f - s)));
                store(for_gate + hidden + i, back * g * s);
            }
        }
        outer(rows, here, w, w, act, hidden, hidden, to[DOWN], add);
        times(rows, for_gate_up, 2 * hidden, 2 * hidden, for_gate, w, 0, for_x, w);
        normed(rows, w, middle, l->second_norm, inverse, normed_x);
        outer(rows, for_gate_up, 2 * hidden, hidden, normed_x, w, w, to[GATE], add);
        outer(rows, for_gate_up + hidden, 2 * hidden, hidden, normed_x, w, w, to[UP], add);
        for (int64_t r = 0; r < rows; r++) {
            norm_back(w, for_x + r * w, middle + r * w, l->second_norm, inverse[r], here + r * w, for_middle + (begin + r) * w, to[SECOND_NORM]);
        }
        outer(rows, for_middle + begin * w, w, w, kept.attended + begin * q, q, q, to[O], add);
        times(rows, for_middle + begin * w, w, w, for_o, q, 0, for_attended + begin * q, q);
    }
    Attention a = of_layer(l);
    if (!whole_sequences(l, part)) {
#pragma omp barrier
    }
    attend_back(&a, kept.turned, kept.turned + q, kept.raw + q + kv, for_attended, kept.tops, for_qkv, for_qkv + q, for_qkv + q + kv, rest, part);
    if (!whole_sequences(l, part)) {
#pragma omp barrier
    }
    for (int64_t begin = start; begin < stop; begin += BLOCK) {
        int64_t rows = least(BLOCK, stop - begin);
        int add = begin > start;
        float *here = for_qkv + begin * all;
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = angle_of(l, begin + r);
            for (int64_t h = 0; h < l->heads + l->kv; h++) {
                float *head = here + r * all + h * d, inverse;
                const float *weight = h < l->heads ? l->q_norm : l->k_norm, *raw = kept.raw + (begin + r) * all + h * d;
                turn(d / 2, head, l->cos + at, l->sin + at, -1, head);
                if (!weight) continue;
                inverses(1, d, l->eps, raw, &inverse);
                norm_back(d, head, raw, weight, inverse, 0, head, to[h < l->heads ? Q_NORM : K_NORM]);
            }
        }
        times(rows, here, all, all, for_q, w, 0, for_x, w);
        normed(rows, w, x + begin * w, l->norm, kept.inverse + begin, normed_x);
        outer(rows, here, all, q, normed_x, w, w, to[Q], add);
        outer(rows, here + q, all, kv, normed_x, w, w, to[K], add);
        outer(rows, here + q + kv, all, kv, normed_x, w, w, to[V], add);
        for (int64_t r = begin; r < begin + rows; r++) {
            norm_back(w, for_x + (r - begin) * w, x + r * w, l->norm, kept.inverse[r], for_middle + r * w, grad + r * w, to[NORM]);
        }
    }
}

/* No more threads than blocks: each finds something. */
static int teams_of(const Layer *l, int64_t threads) { return (int)least(threads, (l->b * l->t + BLOCK - 1) / BLOCK); }

/* Layers after each other; keep[i] is what layer i keeps, and behind it, but for the last one, what it gives. */
void groundup_layers(const Layer *layers, int64_t count, const float *x, float *const *keep, float *y, float *scratch, int64_t threads) {
#pragma omp parallel num_threads(teams_of(layers, threads))
    for (int64_t i = 0; i < count; i++) {
        const float *from = i ? kept_in(layers + i - 1, keep[i - 1]).end : x;
        float *to = i + 1 < count ? kept_in(layers + i, keep[i]).end : y;
        layer(layers + i, from, keep[i], to, scratch, (Part){omp_get_thread_num(), omp_get_num_threads()});
    }
}

void groundup_layers_back(const Layer *layers, int64_t count, const float *x, float *const *keep, float *grad, const Gradients *found, float *scratch,
                          int64_t threads) {
#pragma omp parallel num_threads(teams_of(layers, threads))
    {
        Part part = {omp_get_thread_num(), omp_get_num_threads()};
        for (int64_t i = count - 1; i >= 0; i--) {
            const float *from = i ? kept_in(layers + i - 1, keep[i - 1]).end : x;
            layer_back(layers + i, from, keep[i], grad, found + i, i + 1 < count ? found + i + 1 : 0, scratch, part);
        }
#pragma omp barrier
        gather_layer(layers, found, parts_in(layers, scratch, part.threads), part);
    }
}

/* -- a head and its loss --------------------------------------------------------------------------------------------------------- */
static int64_t logits_of(int64_t v) { return BLOCK * ((v + PANEL - 1) / PANEL * PANEL); }

/* Floats of working memory. */
int64_t groundup_token_loss_scratch(int64_t w, int64_t v, int64_t threads) {
    return v * w * (threads + 1) + logits_of(v) / BLOCK * w + threads * logits_of(v);
}

/* The `entropy` of x W', logits of x [n][w], a multiple of WIDTH, and W [v][w], and its gradients (of W: NULL where nobody asks). The logits of a block of
   rows stay in a thread's cache. */
void groundup_token_loss(int64_t n, int64_t w, int64_t v, const float *x, const float *weight, const int64_t *targets, float z, float *loss, float *for_x,
                         float *for_weight, float *scratch, int64_t threads) {
    int64_t wide = logits_of(v) / BLOCK, blocks = (n + BLOCK - 1) / BLOCK;
    float *there = scratch, *back = there + wide * w, *logits = back + v * w, *parts = logits + threads * logits_of(v);
#pragma omp parallel num_threads((int)least(threads, blocks)) if (n * v > 8192)
    {
        Part part = {omp_get_thread_num(), omp_get_num_threads()};
        float *block = logits + part.thread * logits_of(v), *to = part.thread && for_weight ? parts + (part.thread - 1) * v * w : for_weight;
        int64_t start = begin_of(part, blocks) * BLOCK, stop = least(end_of(part, blocks) * BLOCK, n);
        lay(&(Laid){weight, v, w, there, 0, w}, 1, 0, part);
        lay(&(Laid){weight, v, w, back, 0, v}, 1, 1, part);
#pragma omp barrier
        for (int64_t begin = start; begin < stop; begin += BLOCK) {
            int64_t rows = least(BLOCK, stop - begin);
            times(rows, x + begin * w, w, w, there, wide, 0, block, wide);
            for (int64_t r = 0; r < rows; r++) loss[begin + r] = entropy(v, block + r * wide, targets[begin + r], z, 1);
            times(rows, block, wide, v, back, w, 0, for_x + begin * w, w);
            outer(rows, block, wide, v, x + begin * w, w, w, to, begin > start);
        }
#pragma omp barrier
        if (for_weight) gather(v * w, for_weight, parts, v * w, part);
    }
}

/* -- gradients of a whole model ------------------------------------------------------------------------------------------------ */
/* Sum of the squares of all numbers of `count` arrays; each piece is summed in one order, and the pieces after each other. */
void groundup_squares(int64_t count, float *const *arrays, const int64_t *sizes, double *parts, double *sum, int64_t threads) {
    int64_t pieces = 0;
#pragma omp parallel num_threads((int)threads)
    {
        int64_t place = 0;
        for (int64_t a = 0; a < count; place += (sizes[a++] + PIECE - 1) / PIECE) {
#pragma omp for schedule(static) nowait
            for (int64_t begin = 0; begin < sizes[a]; begin += PIECE) {
                parts[place + begin / PIECE] = dot(arrays[a] + begin, arrays[a] + begin, least(PIECE, sizes[a] - begin));
            }
        }
    }
    for (int64_t a = 0; a < count; a++) pieces += (sizes[a] + PIECE - 1) / PIECE;
    *sum = 0;
    for (int64_t p = 0; p < pieces; p++) *sum += parts[p];
}

void groundup_scale(int64_t count, float *const *arrays, const int64_t *sizes, float factor, int64_t threads) {
#pragma omp parallel num_threads((int)threads)
    for (int64_t a = 0; a < count; a++) {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < sizes[a]; i++) arrays[a][i] *= factor;
    }
}

typedef struct {
    float *weight, *mean, *square, *steps; /* running means of the gradients and of their squares, and how many steps they hold */
    const float *grad;
    int64_t size;
} Adaptive;

/* One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) on `count` arrays. */
void groundup_adamw(int64_t count, const Adaptive *arrays, double lr, double beta1, double beta2, double eps, double decay, int64_t threads) {
    for (int64_t a = 0; a < count; a++) *arrays[a].steps += 1;
#pragma omp parallel num_threads((int)threads)
    for (int64_t a = 0; a < count; a++) {
        Adaptive x = arrays[a];
        double root = __builtin_sqrt(1 - pow(beta2, *x.steps));
        float keep = (float)(1 - lr * decay), rate = (float)(lr * root / (1 - pow(beta1, *x.steps))), least_root = (float)(eps * root);
        float old = (float)beta1, new = (float)(1 - beta1), old_square = (float)beta2, new_square = (float)(1 - beta2);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < x.size; i++) {
            float g = x.grad[i], mean = old * x.mean[i] + new * g, square = old_square * x.square[i] + new_square * g * g;
            x.mean[i] = mean;
            x.square[i] = square;
            x.weight[i] = x.weight[i] * keep - rate * mean / (__builtin_sqrtf(square) + least_root);
        }
    }
}
