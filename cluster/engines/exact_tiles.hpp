// Vectors, products and tiles: what the kernels of exact_kernels.hpp are made of, and included with them.

typedef float V __attribute__((vector_size(4 * W)));
typedef int I __attribute__((vector_size(4 * W)));
typedef float VU __attribute__((vector_size(4 * W), aligned(4)));
// Sums in double always run over 8 lanes, so that both instruction sets give the same bytes.
typedef double D8 __attribute__((vector_size(64)));
typedef float F8 __attribute__((vector_size(32), aligned(4)));

constexpr int NR = 2 * W;          // centroids in a tile
constexpr int ROWS = 16 * MR;      // rows that a thread handles at once, at most
constexpr int AHEAD = 2;           // rows between telling the processor and working on them
constexpr int GROUP = 256;         // centroids whose partial scores are kept between chunks of columns
typedef Word Bits;

static inline V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
static inline void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
static inline V splat(float x) { return x - V{}; }

static inline double total(const D8& v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// Rows in the order of their labels lie anywhere in memory: the processor is told in time which comes next.
static inline void fetch(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// x[0..n) . y[0..n) over 4 * W lanes. Depth of the longest chain of additions: n / (4 W) + 9, + W for the tail.
static inline float dot(const float* x, const float* y, int64_t n) {
    V a = {}, b = {}, c = {}, d = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        a += load(x + i) * load(y + i);
        b += load(x + i + W) * load(y + i + W);
        c += load(x + i + 2 * W) * load(y + i + 2 * W);
        d += load(x + i + 3 * W) * load(y + i + 3 * W);
    }
    for (; i + W <= n; i += W) a += load(x + i) * load(y + i);
    float sum = 0;
    for (; i < n; i++) sum += x[i] * y[i];
    return SUM((a + b) + (c + d)) + sum;
}

// The products of x with four others at once, so that x is loaded once. Longest chain: n / (2 W) + 7, + W for the tail.
static inline void dot4(const float* x, const float* const y[4], int64_t n, float out[4]) {
    V a[4] = {}, b[4] = {};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        const V x0 = load(x + i), x1 = load(x + i + W);
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            a[q] += x0 * load(y[q] + i);
            b[q] += x1 * load(y[q] + i + W);
        }
    }
    for (int q = 0; q < 4; q++) {
        float sum = 0;
        for (int64_t j = i; j < n; j++) sum += x[j] * y[q][j];
        out[q] = SUM(a[q] + b[q]) + sum;
    }
}

// |c - o|^2 - 2 (x - o).(c - o), each difference taken in double.
static double distance64(const float* x, const float* c, const float* o, int64_t n) {
    D8 a = {}, l = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        D8 xo = __builtin_convertvector(*reinterpret_cast<const F8*>(x + i), D8);
        D8 co = __builtin_convertvector(*reinterpret_cast<const F8*>(c + i), D8);
        D8 oo = __builtin_convertvector(*reinterpret_cast<const F8*>(o + i), D8);
        a += (xo - oo) * (co - oo);
        l += (co - oo) * (co - oo);
    }
    double cross = total(a), length = total(l);
    for (; i < n; i++) {
        double co = double(c[i]) - o[i];
        cross += (double(x[i]) - o[i]) * co;
        length += co * co;
    }
    return length - 2 * cross;
}

// Panels of NR centroids: [panel][column][NR]; missing centroids are zeros.
static void pack(int64_t k, int64_t d, const float* from, float* to) {
    for (int64_t p = 0; p * NR < k; p++)
        for (int64_t j = 0; j < d; j++)
            for (int64_t c = 0; c < NR; c++) *to++ = p * NR + c < k ? from[(p * NR + c) * d + j] : 0;
}

static inline void centre(const float* x, const float* origin, int64_t d, float* to) {
    int64_t j = 0;
    for (; j + W <= d; j += W) store(to + j, load(x + j) - load(origin + j));
    for (; j < d; j++) to[j] = x[j] - origin[j];
}

// What the threads share, and what one thread works on.
struct Best {
    V first, second;
    I index;
};
struct Scratch {
    float* rows;     // ROWS x d, panels of MR rows: [panel][column][MR]
    float* partial;  // ROWS x GROUP scores between chunks of columns
    float* row;      // d: one centred row
    Best* best;      // ROWS
    float* limit;    // ROWS: what FILTER must reach; |x|^2 less all errors for KEEP
    float* lengths;  // ROWS: |x|
    Bits* bits;      // ROWS x panels: which centroids did
    int64_t* places; // ROWS: rows of the block
    float* scores;   // k: exact scores of the survivors of one row
    int32_t* survivors;
};

enum Sink { STORE, TOP, KEEP, FILTER };

// Scores of up to ROWS packed rows with all k centroids: x.c + bias(c).
// STORE writes them; TOP keeps the two best of each row in registers; KEEP does so too, and writes scaled lower bounds of
// the squared distances as float16; FILTER keeps a bit where !(score < limit).
// Chains of additions are CHUNK long inside a chunk of columns, plus one for each chunk and one for the bias.
template <Sink sink>
static void scores(const Scratch& s, int64_t rows, int64_t d, int64_t k, const float* packed, const float* bias,
                   float* out = nullptr, int64_t stride = 0, uint16_t* bounds = nullptr, float scale = 0) {
    const int64_t panels = (k + NR - 1) / NR, per = GROUP / NR;
    I lanes;
    for (int i = 0; i < W; i++) lanes[i] = i;
    for (int64_t group = 0; group < panels; group += per) {
        const int64_t end = group + per < panels ? group + per : panels;
        for (int64_t j0 = 0; j0 < d; j0 += CHUNK) {
            const int64_t depth = d - j0 < CHUNK ? d - j0 : CHUNK;
            const bool last = j0 + depth == d;
            for (int64_t p = group; p < end; p++) {
                const float* panel = packed + (p * d + j0) * NR;
                const V bias0 = load(bias + p * NR), bias1 = load(bias + p * NR + W);
                const I at0 = lanes + int(p * NR), at1 = at0 + W;
                for (int64_t i = 0; i < rows; i += MR) {
                    const float *a = s.rows + i * d + j0 * MR, *b = panel;
                    V acc[MR][2] = {};
                    for (int64_t j = 0; j < depth; j++, a += MR, b += NR) {
                        const V b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 16
                        for (int r = 0; r < MR; r++) {
                            const V x = splat(a[r]);
                            acc[r][0] += x * b0;
                            acc[r][1] += x * b1;
                        }
                    }
                    float* kept = s.partial + (p - group) * NR * ROWS + i * NR;
                    if (j0)
#pragma GCC unroll 16
                        for (int r = 0; r < MR; r++) {
                            acc[r][0] += load(kept + r * NR);
                            acc[r][1] += load(kept + r * NR + W);
                        }
                    if (!last) {
#pragma GCC unroll 16
                        for (int r = 0; r < MR; r++) {
                            store(kept + r * NR, acc[r][0]);
                            store(kept + r * NR + W, acc[r][1]);
                        }
                        continue;
                    }
#pragma GCC unroll 16
                    for (int r = 0; r < MR; r++) {
                        const V s0 = acc[r][0] + bias0, s1 = acc[r][1] + bias1;
                        if (sink == STORE) {
                            if (i + r < rows)
                                for (int64_t c = 0; c < NR && p * NR + c < k; c++)
                                    out[(i + r) * stride + p * NR + c] = c < W ? s0[c] : s1[c - W];
                        } else if (sink == TOP || sink == KEEP) {
                            Best& row = s.best[i + r];
                            const I up0 = s0 > row.first;
                            V first = up0 ? s0 : row.first, second = up0 ? row.first : s0;
                            second = second > row.second ? second : row.second;
                            const I up1 = s1 > first;
                            const V lost = up1 ? first : s1;
                            row.index = up1 ? at1 : (up0 ? at0 : row.index);
                            row.first = up1 ? s1 : first;
                            row.second = lost > second ? lost : second;
                            if (sink == KEEP && i + r < rows) {
                                const V most = splat(s.limit[i + r]), unit = splat(scale);
                                uint16_t* to = bounds + s.places[i + r] * panels * NR + p * NR;
                                STORE_HALF(to, (most - 2 * s0) * unit);
                                STORE_HALF(to + W, (most - 2 * s1) * unit);
                            }
                        } else {
                            const V limit = splat(s.limit[i + r]);
                            s.bits[(i + r) * panels + p] = Bits(NOT_LESS(s0, limit) | (NOT_LESS(s1, limit) << W));
                        }
                    }
                }
            }
        }
    }
}

// W vectors of W lanes as a matrix, transposed: each step moves the first bit of the row behind those of the column, and
// the first bit of the column behind those of the row.
static inline void transpose(V v[W]) {
    I low, high;
    for (int i = 0; i < W; i++) low[i] = i / 2 + i % 2 * W, high[i] = low[i] + W / 2;
#pragma GCC unroll 4
    for (int step = 1; step < W; step *= 2) {
        V t[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; i++) {
            t[2 * i] = __builtin_shuffle(v[i], v[i + W / 2], low);
            t[2 * i + 1] = __builtin_shuffle(v[i], v[i + W / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) v[i] = t[i];
    }
}

// Rows s.places[0..rows) of x, less the origin, into panels of MR; missing rows are zeros.
static void pack_rows(const Scratch& s, int64_t rows, int64_t d, const float* x, int64_t stride, const float* origin) {
    for (int64_t i = 0; i < rows; i += MR) {
        float* to = s.rows + i * d;
        const float* from[MR];
        for (int64_t r = 0; r < MR; r++) from[r] = i + r < rows ? x + s.places[i + r] * stride : nullptr;
        int64_t j = 0;
        for (; j + W <= d; j += W) {
            V v[W] = {};
            const V o = origin ? load(origin + j) : V{};
#pragma GCC unroll 16
            for (int r = 0; r < MR; r++)
                if (from[r]) v[r] = load(from[r] + j) - o;
            transpose(v);
            // The lanes beyond MR are overwritten by what comes next; behind the last there is room.
#pragma GCC unroll 16
            for (int c = 0; c < W; c++) store(to + (j + c) * MR, v[c]);
        }
        for (; j < d; j++)
            for (int64_t r = 0; r < MR; r++) to[j * MR + r] = from[r] ? from[r][j] - (origin ? origin[j] : 0) : 0;
    }
}
