/* One step of the decoder on a CPU: B rows, one new token each, from token numbers to logits. native.py compiles and calls it.

   One token is a row of products of vectors with matrices, limited by reading the weights, so everything here serves that: matrices lie in
   panels of 16 outputs, [outputs / 16][inputs][16], read from front to back, once for all rows; and one team of threads lives for the whole
   step.

   Each output is summed over its inputs one by one, whatever the number of rows: a row gets the same bits alone and among others. */

#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16, INT8, MANY }; /* how weights are stored; MANY: float32 for as many rows as AVX-512 has registers for */
enum { PANEL = 16 };              /* outputs of a panel */
enum { BLOCK = 512 };             /* inputs after which sums of int8 products go into floats: 512 * 127 * 32767 is just below 2^31 */

#if defined(__AVX__) || defined(__aarch64__)
enum { TALL = 6 }; /* 6 rows x 2 vectors of sums, and 2 of weights and 1 of inputs, fill the 16 registers of AVX */
#else
enum { TALL = 3 };
#endif
enum { HALF = PANEL / LANES / 2 }; /* vectors of half a panel */
enum { MANY_ROWS = 16 };           /* at once with AVX-512: their sums stay in registers, and a matrix is read once for all of them */

typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Pair __attribute__((may_alias)); /* two int16 */

typedef struct {
    const void *weight;  /* panels; bfloat16: 8 words of outputs (j, j + 8); int8: [inputs / 2][16][2] */
    const float *scale;  /* int8: of each output */
    const float *bias;   /* or NULL */
    int64_t in, out;     /* true sizes */
} Matrix;

typedef struct {
    const float *norm, *q_norm, *k_norm, *second_norm; /* q_norm, k_norm: or NULL */
    Matrix qkv, attended, gate_up, down;               /* gate_up: panels of gate and up in turns */
    int64_t window;                                    /* 0: none */
    float norm_eps, q_eps, k_eps, second_eps;
} Layer;

typedef struct {
    const Layer *layers;
    const float *table, *norm;
    Matrix head;
    int64_t depth, width, heads, kv_heads, head_dim, hidden, kind;
    float eps;
} Model;

int omp_get_thread_num(void);
int omp_get_num_threads(void);

INLINE int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static void rms_norm(const float *x, const float *weight, float eps, int64_t n, float *y) {
    float factor = 1.0f / __builtin_sqrtf(dot(x, x, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
}

/* -- products with matrices -------------------------------------------------------------------------------------------------- */
typedef struct { /* the rows that a matrix reads */
    const float *x;
    const int16_t *quantised; /* int8 only: rows of int16 and their scales */
    const float *scale;
    int64_t ld; /* numbers from row to row */
} Rows;

/* Sums of `rows` rows with `panels` panels: both are constants where this is inlined, so that the sums stay in registers. */
INLINE void sums(const int kind, const int rows, const int panels, const float *x, int64_t ld, const char *weight, int64_t stride, int64_t n,
                 Floats *sum) {
    Floats s[24];
    UNROLL for (int k = 0; k < rows * panels * 2 * HALF; k++) s[k] = (Floats){0};
    for (int64_t i = 0; i < n; i++) {
        UNROLL for (int p = 0; p < panels; p++) {
            UNROLL for (int j = 0; j < HALF; j++) {
                Floats first, second;
                if (kind == FLOAT32) {
                    const float *w = (const float *)(weight + p * stride) + i * PANEL + j * LANES;
                    first = load(w), second = load(w + PANEL / 2);
                    if (rows < 4) __builtin_prefetch(w + 1024 / 4);
                } else { /* a bfloat16 is the upper half of a float32 */
                    Words w = *(const Words *)((const uint32_t *)(weight + p * stride) + i * PANEL / 2 + j * LANES);
                    first = (Floats)(w << 16), second = (Floats)(w & 0xffff0000u);
                }
                UNROLL for (int r = 0; r < rows; r++) {
                    Floats *to = s + (r * panels + p) * 2 * HALF;
                    to[j] += x[r * ld + i] * first;
                    to[j + HALF] += x[r * ld + i] * second;
                }
            }
        }
    }
    UNROLL for (int k = 0; k < rows * panels * 2 * HALF; k++) sum[k] = s[k];
}

#if defined(__AVX512F__)
typedef float Sixteen __attribute__((vector_size(64), aligned(4), may_alias));

/* The same in one vector for each row and panel; x: [n][MANY_ROWS]. */
INLINE void many_sums(const int rows, const int panels, const float *x, const char *weight, int64_t stride, int64_t n, Floats *sum) {
    Sixteen s[MANY_ROWS];
    UNROLL for (int k = 0; k < rows * panels; k++) s[k] = (Sixteen){0};
    for (int64_t i = 0; i < n; i++) {
        UNROLL for (int p = 0; p < panels; p++) {
            const float *at = (const float *)(weight + p * stride) + i * PANEL;
            Sixteen w = *(const Sixteen *)at;
            __builtin_prefetch(at + 4096 / 4); /* from memory: farther than the machine looks by itself */
            UNROLL for (int r = 0; r < rows; r++) s[r * panels + p] += x[i * MANY_ROWS + r] * w;
        }
    }
    UNROLL for (int k = 0; k < rows * panels; k++) *(Sixteen *)(sum + k * 2 * HALF) = s[k];
}
#endif

/* The same for int8 weights and int16 rows. */
INLINE void int8_sums(const int rows, const int panels, const int16_t *x, int64_t ld, const int8_t *weight, int64_t stride, int64_t n,
                      Floats *sum) {
    UNROLL for (int k = 0; k < rows * panels * 2 * HALF; k++) sum[k] = (Floats){0};
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
#if defined(__AVX2__)
        __m256i s[12];
        UNROLL for (int k = 0; k < rows * panels * 2; k++) s[k] = _mm256_setzero_si256();
        for (int64_t i = begin; i < end; i += 2) {
            __m256i pair[6];
            UNROLL for (int r = 0; r < rows; r++) pair[r] = _mm256_set1_epi32(*(const Pair *)(x + r * ld + i));
            UNROLL for (int k = 0; k < panels * 2; k++) {
                const int8_t *at = weight + (k / 2) * stride + i * PANEL + (k % 2) * PANEL;
                __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at));
                UNROLL for (int r = 0; r < rows; r++) {
                    __m256i *to = s + r * panels * 2 + k;
                    *to = _mm256_add_epi32(*to, _mm256_madd_epi16(w, pair[r]));
                }
            }
        }
        UNROLL for (int k = 0; k < rows * panels * 2; k++) sum[k] += (Floats)_mm256_cvtepi32_ps(s[k]);
#else
        for (int r = 0; r < rows; r++) {
            for (int p = 0; p < panels; p++) {
                int32_t s[PANEL] = {0};
                for (int64_t i = begin; i < end; i += 2) {
                    const int8_t *w = weight + p * stride + i * PANEL;
                    int32_t first = x[r * ld + i], second = x[r * ld + i + 1];
                    for (int o = 0; o < PANEL; o++) s[o] += w[2 * o] * first + w[2 * o + 1] * second;
                }
                float *to = (float *)(sum + (r * panels + p) * 2 * HALF);
                for (int o = 0; o < PANEL; o++) to[o] += (float)s[o];
            }
        }
#endif
    }
}

/* y (+)= x @ weight.T + bias for these rows and panels. */
INLINE void tile(const int kind, const int rows, const int panels, const Matrix *m, const Rows *x, int64_t row, int64_t panel, float *y,
                 int64_t ld, int add) {
    Floats sum[32];
    int64_t bytes = kind == FLOAT32 || kind == MANY ? m->in * PANEL * 4 : kind == BFLOAT16 ? m->in * PANEL * 2 : up_to(m->in, 2) * PANEL;
    const char *weight = (const char *)m->weight + panel * bytes;
    if (kind == INT8) int8_sums(rows, panels, x->quantised + row * x->ld, x->ld, (const int8_t *)weight, bytes, up_to(m->in, 2), sum);
#if defined(__AVX512F__)
    else if (kind == MANY) many_sums(rows, panels, x->x, weight, bytes, m->in, sum);
#endif
    else sums(kind, rows, panels, x->x + row * x->ld, x->ld, weight, bytes, m->in, sum);
    for (int r = 0; r < rows; r++) {
        for (int p = 0; p < panels; p++) {
            int64_t o = (panel + p) * PANEL, count = m->out - o < PANEL ? m->out - o : PANEL;
            float *to = y + (row + r) * ld + o, whole[PANEL];
            for (int j = 0; j < 2 * HALF; j++) {
                Floats v = sum[(r * panels + p) * 2 * HALF + j];
                if (kind == INT8) v *= load(m->scale + o + j * LANES) * x->scale[row + r];
                if (m->bias) v += load(m->bias + o + j * LANES);
                if (count < PANEL) store(whole + j * LANES, v);
                else if (add) store(to + j * LANES, load(to + j * LANES) + v);
                else store(to + j * LANES, v);
            }
            if (count < PANEL) for (int64_t k = 0; k < count; k++) to[k] = add ? to[k] + whole[k] : whole[k];
        }
    }
}

/* Few rows take several panels at once: one sum alone would wait for its own last addition. */
INLINE void product_of(const int kind, const Matrix *m, const Rows *x, int64_t b, float *y, int64_t ld, int add, int64_t panel, int64_t end) {
    int64_t groups = (b + TALL - 1) / TALL;
    while (panel < end) {
        int64_t left = end - panel;
        int taken = 1;
        for (int64_t g = 0; g < groups; g++) {
            int64_t row = b * g / groups;
            switch (b * (g + 1) / groups - row) {
#define CASE(rows, panels) tile(kind, rows, panels, m, x, row, panel, y, ld, add)
            case 1: if (left >= 4 && b == 1) taken = 4, CASE(1, 4); else CASE(1, 1); break;
            case 2: if (left >= 2 && b == 2) taken = 2, CASE(2, 2); else CASE(2, 1); break;
#if defined(__AVX__) || defined(__aarch64__) /* where TALL is 6 */
            case 3: if (left >= 2 && b == 3) taken = 2, CASE(3, 2); else CASE(3, 1); break;
            case 4: CASE(4, 1); break;
            case 5: CASE(5, 1); break;
            case 6: CASE(6, 1); break;
#else
            case 3: CASE(3, 1); break;
#endif
#undef CASE
            }
        }
        panel += taken;
    }
}

#if defined(__AVX512F__)
/* Groups of rows as [inputs][MANY_ROWS]: what is multiplied with a weight lies together. */
static void turn_rows(const Rows *x, int64_t b, int64_t n, int64_t groups, float *to) {
    for (int64_t g = 0; g < groups; g++, to += up_to(n, LANES) * MANY_ROWS) {
        int64_t row = b * g / groups, count = b * (g + 1) / groups - row;
        for (int64_t first = 0; first < count; first += LANES) {
            for (int64_t i = 0; i < n; i += LANES) {
                Floats t[LANES];
                UNROLL for (int l = 0; l < LANES; l++) t[l] = first + l < count ? load(x->x + (row + first + l) * x->ld + i) : all(0);
                transposed(t);
                UNROLL for (int l = 0; l < LANES; l++) store(to + (i + l) * MANY_ROWS + first, t[l]);
            }
        }
    }
}

static void product_of_many(const Matrix *m, const Rows *rows, int64_t b, float *y, int64_t ld, int add, int64_t panel, int64_t end, float *turned) {
    int64_t groups = (b + MANY_ROWS - 1) / MANY_ROWS;
    turn_rows(rows, b, m->in, groups, turned);
    while (panel < end) {
        int taken = 1;
        for (int64_t g = 0; g < groups; g++) {
            const Rows group = {.x = turned + g * up_to(m->in, LANES) * MANY_ROWS}, *x = &group;
            int64_t row = b * g / groups;
            switch (b * (g + 1) / groups - row) {
#define CASE(rows, panels) tile(MANY, rows, panels, m, x, row, panel, y, ld, add)
#define FEW(rows) case rows: if (b == rows && end - panel > 1) taken = 2, CASE(rows, 2); else CASE(rows, 1); break;
#define MORE(rows) case rows: CASE(rows, 1); break;
                FEW(4) FEW(5) FEW(6) FEW(7) FEW(8)
                MORE(9) MORE(10) MORE(11) MORE(12) MORE(13) MORE(14) MORE(15) MORE(16)
#undef CASE
#undef FEW
#undef MORE
            }
        }
        panel += taken;
    }
}
#endif

static void product(int64_t kind, const Matrix *m, const Rows *x, int64_t b, float *y, int64_t ld, int add, int64_t first, int64_t end, float *turned) {
#if defined(__AVX512F__)
    if (kind == FLOAT32 && b >= 4) product_of_many(m, x, b, y, ld, add, first, end, turned);
    else
#endif
    if (kind == FLOAT32) product_of(FLOAT32, m, x, b, y, ld, add, first, end);
    else if (kind == BFLOAT16) product_of(BFLOAT16, m, x, b, y, ld, add, first, end);
    else product_of(INT8, m, x, b, y, ld, add, first, end);
}

/* A row in int16 with one scale; what is behind its end, up to an even number, is zero. */
static void quantise(const float *x, int64_t n, int16_t *y, float *scale) {
    float most = 0;
    int finite = 1;
    for (int64_t i = 0; i < n; i++) {
        float size = __builtin_fabsf(x[i]);
        most = size > most ? size : most;
        finite &= size <= __FLT_MAX__;
    }
    if (!finite) { /* a whole number cannot say it, the scale can */
        for (int64_t i = 0; i < up_to(n, 2); i++) y[i] = 0;
        *scale = __builtin_nanf("");
        return;
    }
    float factor = most > 1e-30f ? 32767.0f / most : 0;
    for (int64_t i = 0; i < n; i++) y[i] = (int16_t)(int32_t)((x[i] * factor + 12582912.0f) - 12582912.0f);
    if (n % 2) y[n] = 0;
    *scale = most / 32767.0f;
}

/* -- attention --------------------------------------------------------------------------------------------------------------- */
static void rotate(float *x, const float *cos, const float *sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

/* One head of one row. The new key and value are taken from where they were made, not from the cache: the heads of a group share them, and
   only the first one writes them there. */
static void attend(const Model *m, const Layer *layer, const float *qkv, int64_t head, float *keys, float *values, int64_t length,
                   const float *cos, const float *sin, float *own, float *y) {
    int64_t d = m->head_dim, group = m->heads / m->kv_heads, kv = head / group;
    int64_t begin = layer->window && length + 1 > layer->window ? length + 1 - layer->window : 0, seen = length + 1 - begin;
    float *q = own, *k = own + d, *score = own + 2 * d;
    const float *q_made = qkv + head * d, *k_made = qkv + (m->heads + kv) * d, *v = qkv + (m->heads + m->kv_heads + kv) * d;
    if (layer->q_norm) {
        rms_norm(q_made, layer->q_norm, layer->q_eps, d, q);
        rms_norm(k_made, layer->k_norm, layer->k_eps, d, k);
    } else {
        for (int64_t i = 0; i < d; i++) q[i] = q_made[i], k[i] = k_made[i];
    }
    rotate(q, cos + length * (d / 2), sin + length * (d / 2), d / 2);
    rotate(k, cos + length * (d / 2), sin + length * (d / 2), d / 2);
    if (head % group == 0) for (int64_t i = 0; i < d; i++) keys[length * d + i] = k[i], values[length * d + i] = v[i];

    float scale = 1.0f / __builtin_sqrtf((float)d), most = dot(q, k, d) * scale;
    score[seen - 1] = most;
    for (int64_t t = 0; t + 1 < seen; t++) {
        score[t] = dot(q, keys + (begin + t) * d, d) * scale;
        most = score[t] > most ? score[t] : most;
    }
    int64_t whole = up_to(seen, LANES);
    for (int64_t t = seen; t < whole; t++) score[t] = most;
    for (int64_t t = 0; t < whole; t += LANES) store(score + t, exponential(load(score + t) - most));
    for (int64_t t = seen; t < whole; t++) score[t] = 0;
    Floats sum = {0};
    for (int64_t t = 0; t < whole; t += LANES) sum += load(score + t);
    float factor = 1.0f / total(sum);
    int64_t i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES) {
        Floats s[4] = {{0}};
        for (int64_t t = 0; t < seen; t++) {
            const float *from = (t + 1 < seen ? values + (begin + t) * d : v) + i;
            UNROLL for (int j = 0; j < 4; j++) s[j] += score[t] * load(from + j * LANES);
        }
        UNROLL for (int j = 0; j < 4; j++) store(y + i + j * LANES, s[j] * factor);
    }
    for (; i + LANES <= d; i += LANES) {
        Floats s = {0};
        for (int64_t t = 0; t < seen; t++) s += score[t] * load((t + 1 < seen ? values + (begin + t) * d : v) + i);
        store(y + i, s * factor);
    }
    for (; i < d; i++) {
        float s = 0;
        for (int64_t t = 0; t < seen; t++) s += score[t] * (t + 1 < seen ? values + (begin + t) * d : v)[i];
        y[i] = s * factor;
    }
}

/* -- the step ---------------------------------------------------------------------------------------------------------------- */
typedef struct { /* numbers from row to row of the working memory */
    int64_t width, qkv, attended, both, hidden, longest;
} Sizes;

INLINE Sizes sizes(const Model *m) {
    int64_t hidden = up_to(m->hidden, 16);
    Sizes s = {up_to(m->width, 16), up_to(m->layers[0].qkv.out, 16), up_to(m->heads * m->head_dim, 16), 2 * hidden, hidden, 0};
    s.longest = s.width > s.attended ? s.width : s.attended;
    s.longest = s.hidden > s.longest ? s.hidden : s.longest;
    return s;
}

/* Floats of working memory of a thread: for attention, and rows turned. */
INLINE int64_t own_of(const Model *m, int64_t b, int64_t capacity, int64_t longest) {
    return 2 * m->head_dim + up_to(capacity, 16) + 16 + (b + MANY_ROWS - 1) / MANY_ROWS * MANY_ROWS * longest;
}

/* Floats of working memory that a step over caches of this capacity needs. */
int64_t groundup_scratch(const Model *m, int64_t b, int64_t capacity, int64_t threads) {
    Sizes s = sizes(m);
    int64_t row = 2 * s.width + s.qkv + s.attended + s.both + s.hidden + s.longest / 2 + 1;
    return b * row + threads * (own_of(m, b, capacity, s.longest)) + 64;
}

/* keys, values: of each layer, [B, kv_heads, capacity, head_dim]; cos, sin: [capacity or more, head_dim / 2]. */
void groundup_step(const Model *m, int64_t b, int64_t capacity, int64_t threads, const int64_t *tokens, const int64_t *lengths,
                   float *const *keys, float *const *values, const float *cos, const float *sin, float *scratch, float *logits) {
    Sizes s = sizes(m);
    int64_t kind = m->kind, heads = m->heads, d = m->head_dim;
    float *x = scratch, *normed = x + b * s.width, *qkv = normed + b * s.width, *attended = qkv + b * s.qkv;
    float *both = attended + b * s.attended, *hidden = both + b * s.both, *row_scale = hidden + b * s.hidden, *owned = row_scale + up_to(b, 16);
    int64_t own_size = own_of(m, b, capacity, s.longest);
    int16_t *quantised = (int16_t *)(owned + threads * own_size);
    const Rows from_norm = {normed, quantised, row_scale, kind == INT8 ? s.longest : s.width};
    const Rows from_attended = {attended, quantised, row_scale, kind == INT8 ? s.longest : s.attended};
    const Rows from_hidden = {hidden, quantised, row_scale, kind == INT8 ? s.longest : s.hidden};

#pragma omp parallel num_threads((int)threads)
    {
        const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
        float *own = owned + me * own_size, *turned = own + 2 * d + up_to(capacity, 16) + 16;
        const int64_t row = b * me / team, row_end = b * (me + 1) / team; /* this thread's share of the rows */
#define SHARE(n) (n) * me / team, (n) * (me + 1) / team
#define BARRIER _Pragma("omp barrier")
#define NORM(weight, eps) \
    for (int64_t r = row; r < row_end; r++) { \
        rms_norm(x + r * s.width, weight, eps, m->width, normed + r * s.width); \
        if (kind == INT8) quantise(normed + r * s.width, m->width, quantised + r * s.longest, row_scale + r); \
    } \
    BARRIER
#define QUANTISE(from, ld, n) \
    if (kind == INT8) { \
        for (int64_t r = row; r < row_end; r++) quantise((from) + r * (ld), n, quantised + r * s.longest, row_scale + r); \
        BARRIER \
    }
        for (int64_t r = row; r < row_end; r++) {
            for (int64_t i = 0; i < m->width; i++) x[r * s.width + i] = m->table[tokens[r] * m->width + i];
        }
        for (int64_t l = 0; l < m->depth; l++) {
            const Layer *layer = m->layers + l;
            NORM(layer->norm, layer->norm_eps)
            product(kind, &layer->qkv, &from_norm, b, qkv, s.qkv, 0, SHARE(s.qkv / PANEL), turned);
            BARRIER
            for (int64_t unit = b * heads * me / team; unit < b * heads * (me + 1) / team; unit++) {
                int64_t r = unit / heads, head = unit % heads;
                int64_t at = (r * m->kv_heads + head / (heads / m->kv_heads)) * capacity * d;
                attend(m, layer, qkv + r * s.qkv, head, keys[l] + at, values[l] + at, lengths[r], cos, sin, own,
                       attended + r * s.attended + head * d);
            }
            BARRIER
            QUANTISE(attended, s.attended, heads * d)
            product(kind, &layer->attended, &from_attended, b, x, s.width, 1, SHARE(s.width / PANEL), turned);
            BARRIER
            NORM(layer->second_norm, layer->second_eps)
            const int64_t pairs = s.hidden / PANEL, pair = pairs * me / team, pair_end = pairs * (me + 1) / team;
            product(kind, &layer->gate_up, &from_norm, b, both, s.both, 0, 2 * pair, 2 * pair_end, turned);
            for (int64_t r = 0; r < b; r++) {
                for (int64_t p = pair; p < pair_end; p++) {
                    UNROLL for (int j = 0; j < 2 * HALF; j++) {
                        const float *gate = both + r * s.both + 2 * p * PANEL + j * LANES;
                        Floats g = load(gate);
                        store(hidden + r * s.hidden + p * PANEL + j * LANES, g / (1.0f + exponential(-g)) * load(gate + PANEL));
                    }
                }
            }
            BARRIER
            QUANTISE(hidden, s.hidden, m->hidden)
            product(kind, &layer->down, &from_hidden, b, x, s.width, 1, SHARE(s.width / PANEL), turned);
            BARRIER
        }
        NORM(m->norm, m->eps)
        product(kind, &m->head, &from_norm, b, logits, m->head.out, 0, SHARE(up_to(m->head.out, PANEL) / PANEL), turned);
    }
}
