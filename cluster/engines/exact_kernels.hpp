// The kernels of exact.cpp. Included once for each instruction set, inside a namespace and under the matching
// `#pragma GCC target`, with W (floats in a vector), MR (rows in a tile), NOT_LESS (lanes where !(s < t)), SUM (of the
// lanes, pairwise), STORE_HALF and LOAD_HALF (float16, rounded towards zero) defined.
// Nothing from the standard library is instantiated here: code compiled for AVX-512 must not leak into shared templates.

#include "exact_tiles.hpp"

// The nearest of the survivors of row i, by float32 scores, near-ties by distances in float64, the lowest index first.
// Where only some centroids were looked at, the previous one stands for all the others.
static int32_t finish(const Scratch& s, const Job& job, int64_t i, float length, int64_t& dots) {
    const int64_t looked = job.some ? job.few : job.k, panels = (looked + NR - 1) / NR, at = s.places[i];
    const float* x = job.x + at * job.d;
    int64_t count = 0;
    float best = -__builtin_inff();
    bool own = !job.some;
    for (int64_t p = 0; p < panels; p++)
        for (Bits bits = s.bits[i * panels + p]; bits; bits &= bits - 1) {
            const int64_t place = p * NR + __builtin_ctz(bits);
            if (place >= looked) continue;
            const int32_t c = job.some ? job.some[place] : int32_t(place);
            if (!own && c > job.labels[at]) s.survivors[count++] = job.labels[at], own = true;
            s.survivors[count++] = c;
        }
    if (!own) s.survivors[count++] = job.labels[at];
    // The proof leaves at least one; numbers beyond float32 may leave none, and then nothing was proved.
    if (!count)
        while (count < job.k) s.survivors[count] = int32_t(count), count++;
    if (job.clear) job.clear[at] = count == 1;
    if (count == 1) return s.survivors[0];
    centre(x, job.origin, job.d, s.row);
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
    if (job.clear) job.clear[at] = close == 1;
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
        if (i + AHEAD < rows) {
            fetch(job.x + s.places[i + AHEAD] * job.d, 4 * job.d);
            fetch(job.bounds + s.places[i + AHEAD] * panels * NR, 2 * panels * NR);
        }
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
    const int64_t width = job.p + 1, stride = job.p + 2, looked = job.some ? job.few : job.k;
    const int64_t panels = (looked + NR - 1) / NR;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = s.places[i];
        const float length = job.projected[at * stride + width];
        float own;
        if (job.some) {
            own = job.own(length, job.distances[at]);
        } else {
            if (i + AHEAD < rows) fetch(job.x + s.places[i + AHEAD] * job.d, 4 * job.d);
            const int32_t mine = job.labels[at];
            centre(job.x + at * job.d, job.origin, job.d, s.row);
            own = dot(s.row, job.centroids + mine * job.d, job.d) + job.bias[mine];
        }
        s.limit[i] = own - job.doubt(length, job.filter_error);
    }
    pack_rows(s, rows, width, job.projected, stride, nullptr);
    scores<FILTER>(s, rows, width, looked, job.packed, job.some ? job.some_bias : job.bias);
    int64_t dots = 0;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = s.places[i];
        Bits any = 0;
        for (int64_t p = 0; p < panels; p++) any |= s.bits[i * panels + p];
        if (job.some && !any) continue;
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

// sum + w[0] x[0] + ... + w[count - 1] x[count - 1], one after the other; up to 4 share the reading of the sum.
static void add(double* sum, const float* const x[4], const double w[4], int64_t count, int64_t d) {
    if (count == 4)
        for (int64_t j = 0; j < d; j++) {
            double at = sum[j];
            at += w[0] * x[0][j];
            at += w[1] * x[1][j];
            at += w[2] * x[2][j];
            sum[j] = at + w[3] * x[3][j];
        }
    else
        for (int64_t r = 0; r < count; r++)
            for (int64_t j = 0; j < d; j++) sum[j] += w[r] * x[r][j];
}
