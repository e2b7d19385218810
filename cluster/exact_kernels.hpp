// The kernels of exact.cpp. Included once for each instruction set, inside a namespace and under the matching
// `#pragma GCC target`, with W (floats in a vector), MR (rows in a tile), NOT_LESS (lanes where !(s < t)), SUM (of the
// lanes, pairwise), STORE_HALF and LOAD_HALF (float16, rounded towards zero) defined.
// Nothing from the standard library is instantiated here: code compiled for AVX-512 must not leak into shared templates.

typedef float V __attribute__((vector_size(4 * W)));
typedef int I __attribute__((vector_size(4 * W)));
typedef float VU __attribute__((vector_size(4 * W), aligned(4)));
// Sums in double always run over 8 lanes, so that both instruction sets give the same bytes.
typedef double D8 __attribute__((vector_size(64)));
typedef float F8 __attribute__((vector_size(32), aligned(4)));

constexpr int NR = 2 * W;          // centroids in a tile
constexpr int ROWS = 16 * MR;      // rows that a thread handles at once, at most
constexpr int GROUP = 256;         // centroids whose partial scores are kept between chunks of columns
typedef Word Bits;

static inline V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
static inline void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
static inline V splat(float x) { return x - V{}; }

static inline double total(const D8& v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

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

// Rows s.places[0..rows) of x, less the origin, into panels of MR; missing rows are zeros.
static void pack_rows(const Scratch& s, int64_t rows, int64_t d, const float* x, int64_t stride, const float* origin) {
    for (int64_t i = 0; i < rows; i += MR) {
        float* to = s.rows + i * d;
        for (int64_t r = 0; r < MR; r++) {
            if (i + r >= rows) {
                for (int64_t j = 0; j < d; j++) to[j * MR + r] = 0;
                continue;
            }
            const float* from = x + s.places[i + r] * stride;
            if (origin)
                for (int64_t j = 0; j < d; j++) to[j * MR + r] = from[j] - origin[j];
            else
                for (int64_t j = 0; j < d; j++) to[j * MR + r] = from[j];
        }
    }
}

// The nearest of the survivors of row i, by float32 scores, near-ties by distances in float64, the lowest index first.
static int32_t finish(const Scratch& s, const Job& job, int64_t i, float length, int64_t& dots) {
    const int64_t panels = (job.k + NR - 1) / NR;
    const float* x = job.x + s.places[i] * job.d;
    centre(x, job.origin, job.d, s.row);
    int64_t count = 0;
    float best = -__builtin_inff();
    for (int64_t p = 0; p < panels; p++)
        for (Bits bits = s.bits[i * panels + p]; bits; bits &= bits - 1) {
            const int64_t c = p * NR + __builtin_ctz(bits);
            if (c < job.k) s.survivors[count++] = int32_t(c);
        }
    // The proof leaves at least one; numbers beyond float32 may leave none, and then nothing was proved.
    if (!count)
        while (count < job.k) s.survivors[count] = int32_t(count), count++;
    for (int64_t q = 0; q < count; q += 4) {
        const float* four[4];
        for (int64_t t = 0; t < 4; t++) four[t] = job.centroids + s.survivors[q + t < count ? q + t : q] * job.d;
        dot4(s.row, four, job.d, s.scores + q);
    }
    for (int64_t q = 0; q < count; q++) {
        s.scores[q] += job.bias[s.survivors[q]];
        if (s.scores[q] > best) best = s.scores[q];
    }
    dots += count;
    // Written so that NaN and infinity (rows near the limits of float32) are decided in float64 as well.
    const float limit = best - job.doubt(length, job.dot_error);
    int64_t close = 0;
    for (int64_t q = 0; q < count; q++)
        if (!(s.scores[q] < limit)) s.survivors[close++] = s.survivors[q];
    if (close == 1) return s.survivors[0];
    double nearest = __builtin_inf();
    for (int64_t q = 0; q < close; q++) {
        const double at = distance64(x, job.raw + int64_t(s.survivors[q]) * job.d, job.middle, job.d);
        if (at < nearest) nearest = at;
    }
    double scale = job.widest;
    for (int64_t j = 0; j < job.d; j++) scale += (double(x[j]) - job.middle[j]) * (double(x[j]) - job.middle[j]);
    for (int64_t q = 0; q < close; q++)
        if (distance64(x, job.raw + int64_t(s.survivors[q]) * job.d, job.middle, job.d) <= nearest + TIE * scale)
            return s.survivors[q];
    return s.survivors[0];
}

// The best two scores over all lanes, and where the best is.
static inline void winner(const Best& row, float& first, float& second, int32_t& index) {
    first = row.first[0], second = row.second[0], index = row.index[0];
    for (int lane = 1; lane < W; lane++) {
        const float f = row.first[lane], g = row.second[lane];
        if (f > first) {
            second = first > g ? first : g;
            first = f;
            index = row.index[lane];
        } else if (f > second) {
            second = f;
        }
    }
}

// Labels to begin with where there are none: the centroid of the largest projected bound.
static int64_t guess(const Scratch& s, const Job& job, int64_t rows) {
    pack_rows(s, rows, job.p + 1, job.projected, job.p + 2, nullptr);
    const V low = splat(-__builtin_inff());
    for (int64_t i = 0; i < ROWS; i++) s.best[i] = Best{low, low, I{}};
    scores<TOP>(s, rows, job.p + 1, job.k, job.packed, job.bias);
    for (int64_t i = 0; i < rows; i++) {
        float first, second;
        winner(s.best[i], first, second, job.labels[s.places[i]]);
    }
    return 0;
}

// The squared distance of row `at` to its centroid, while the row is still in the cache.
static inline void measure(const Job& job, int64_t at) {
    const float *x = job.x + at * job.d, *c = job.raw + int64_t(job.labels[at]) * job.d;
    D8 sum[4] = {};
    int64_t j = 0;
    for (; j + 32 <= job.d; j += 32)
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            const D8 gap = __builtin_convertvector(*reinterpret_cast<const F8*>(x + j + 8 * q), D8) -
                           __builtin_convertvector(*reinterpret_cast<const F8*>(c + j + 8 * q), D8);
            sum[q] += gap * gap;
        }
    double square = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; j < job.d; j++) square += (double(x[j]) - c[j]) * (double(x[j]) - c[j]);
    job.distances[at] = float(square);
}

// Every pair in float32, the best two of each row kept; rows whose best two are too close are looked at again.
static int64_t dense(const Scratch& s, const Job& job, int64_t rows) {
    pack_rows(s, rows, job.d, job.x, job.d, job.origin);
    const V low = splat(-__builtin_inff());
    for (int64_t i = 0; i < ROWS; i++) s.best[i] = Best{low, low, I{}};
    for (int64_t i = 0; i < rows; i++) {
        centre(job.x + s.places[i] * job.d, job.origin, job.d, s.row);
        const float square = dot(s.row, s.row, job.d);
        s.lengths[i] = __builtin_sqrtf(square);
        s.limit[i] = job.too_far(s.lengths[i]) ? -__builtin_inff() : square - job.distance_doubt(s.lengths[i]);
    }
    if (job.bounds)
        scores<KEEP>(s, rows, job.d, job.k, job.packed, job.bias, nullptr, 0, job.bounds, job.scale);
    else
        scores<TOP>(s, rows, job.d, job.k, job.packed, job.bias);
    int64_t open = 0, dots = 0;
    for (int64_t i = 0; i < rows; i++) {
        float first, second;
        winner(s.best[i], first, second, job.labels[s.places[i]]);
        const float doubt = job.doubt(s.lengths[i], job.dense_error);
        if (first - second > doubt) {
            measure(job, s.places[i]);
        } else {  // NaN too
            s.limit[open] = first - doubt;
            s.lengths[open] = s.lengths[i];
            s.places[open++] = s.places[i];
        }
    }
    if (open) {
        pack_rows(s, open, job.d, job.x, job.d, job.origin);
        scores<FILTER>(s, open, job.d, job.k, job.packed, job.bias);
        for (int64_t i = 0; i < open; i++) {
            job.labels[s.places[i]] = finish(s, job, i, s.lengths[i], dots);
            measure(job, s.places[i]);
        }
    }
    return dots;
}

// Only the pairs that the bounds of an earlier dense pass do not exclude (PAIR BOUND in exact.cpp).
static int64_t paired(const Scratch& s, const Job& job, int64_t rows) {
    const int64_t panels = (job.k + NR - 1) / NR;
    const float unit = __builtin_sqrtf(job.scale);
    int64_t dots = 0;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = s.places[i];
        const int32_t mine = job.labels[at];
        centre(job.x + at * job.d, job.origin, job.d, s.row);
        const float square = dot(s.row, s.row, job.d), length = __builtin_sqrtf(square);
        const float own = dot(s.row, job.centroids + mine * job.d, job.d) + job.bias[mine];
        const float most = square - 2 * own + job.distance_doubt(length);
        const float far = __builtin_sqrtf(most > 0 ? most : 0) * unit * (1 + 4 * 0x1p-24f);
        const V radius = splat(job.too_far(length) ? __builtin_inff() : far);
        const uint16_t* from = job.bounds + at * panels * NR;
        for (int64_t p = 0; p < panels; p++, from += NR) {
            const V r0 = radius + load(job.moved + p * NR), r1 = radius + load(job.moved + p * NR + W);
            const V grown = splat(1 + 4 * 0x1p-24f);
            s.bits[i * panels + p] = Bits(NOT_LESS(r0 * r0 * grown, LOAD_HALF(from)) |
                                          (NOT_LESS(r1 * r1 * grown, LOAD_HALF(from + W)) << W));
        }
        job.labels[at] = finish(s, job, i, length, dots);
        measure(job, at);
    }
    return dots;
}

// Only the pairs that the projected bound does not exclude (the mathematics is in exact.cpp).
static int64_t filtered(const Scratch& s, const Job& job, int64_t rows) {
    const int64_t width = job.p + 1, stride = job.p + 2;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = s.places[i];
        const int32_t mine = job.labels[at];
        centre(job.x + at * job.d, job.origin, job.d, s.row);
        const float own = dot(s.row, job.centroids + mine * job.d, job.d) + job.bias[mine];
        s.limit[i] = own - job.doubt(job.projected[at * stride + width], job.filter_error);
    }
    pack_rows(s, rows, width, job.projected, stride, nullptr);
    scores<FILTER>(s, rows, width, job.k, job.packed, job.bias);
    int64_t dots = 0;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = s.places[i];
        job.labels[at] = finish(s, job, i, job.projected[at * stride + width], dots);
        measure(job, at);
    }
    return dots;
}

// Coefficients of centred rows in the basis, then the norm of the rest (rounded up) and the norm of the row.
static int64_t project(const Scratch& s, const Job& job, int64_t rows) {
    const int64_t stride = job.p + 2;
    pack_rows(s, rows, job.d, job.x, job.d, job.origin);
    scores<STORE>(s, rows, job.d, job.p, job.packed, job.bias, job.projected + s.places[0] * stride, stride);
    for (int64_t i = 0; i < rows; i++) {
        float* to = job.projected + s.places[i] * stride;
        centre(job.x + s.places[i] * job.d, job.origin, job.d, s.row);
        const float square = dot(s.row, s.row, job.d);
        const float rest = square - dot(to, to, job.p);
        to[job.p] = __builtin_sqrtf((rest > 0 ? rest : 0) + job.rest_error * square) + job.floor;
        to[job.p + 1] = __builtin_sqrtf(square);
    }
    return 0;
}

static void add(double* sum, const float* x, double weight, int64_t d) {
    for (int64_t j = 0; j < d; j++) sum[j] += weight * x[j];
}
