// Nearest centroids on the CPU, exact, with less work than a dense product. Called through ctypes by exact.py.
//
// Everything is centred on an origin o: x stands for fl(x - o), c for fl(c - o), and the score of a pair is
//     s(x, c) = x.c - |c|^2 / 2 = (|x|^2 - |x - c|^2) / 2,   so the nearest centroid has the largest score.
//
// ROUNDING. u = 2^-24. A float32 sum of products whose longest chain of additions has m links is wrong by at most
// m u / (1 - m u) * |x| |c| (Cauchy-Schwarz on the sum of |x_j c_j|), whatever the order and with or without FMA;
// centring moves a score by at most 2.1 u |x| |c|; the bias -|c|^2/2 is rounded once and added once. With C the largest
// |c|, every error below is therefore at most E * (|x| C + C^2 / 2) with E made of such link counts by exact.py, plus
// `tiny` for underflow. A pair is dropped, or a winner believed, only if its score is off by more than
//     doubt(x, E) = 2 E (|x| C + C^2 / 2) + 8e-12 (|x|^2 + C^2) + tiny,
// the middle term being more than the width of a tie. All that remains within the doubt of the best is decided by
// squared distances in float64 from the centroids' mean, the lowest index within 1e-12 (|x|^2 + C^2) of the nearest.
// So labels are a function of rows and centroids alone: not of the mode, the instruction set, the threads, the block
// size or the labels of the pass before.
//
// PROJECTED BOUND. V (d x p, float32) has nearly orthonormal columns: |V'V - I| <= eps, measured in float64 by exact.py.
// Q, its polar factor, has exactly orthonormal ones, and |V - Q| <= eps. For a = Q'x, b = Q'c (exact), P the projection
// on the rest:  x.c = a.b + (Px).(Pc) <= a.b + sqrt(|x|^2 - |a|^2) sqrt(|c|^2 - |b|^2)  = (a, r_x).(b, r_c).
// Computed coefficients are off by at most e |x| with e = eps + (links) u sqrt(p), and likewise for c. So a.b is off by at
// most (2 e + e^2) |x| |c|, and the two residual norms are upper bounds when computed as
// sqrt(|x|^2 - |a|^2 + rest_error |x|^2) with rest_error >= 2 e + e^2 + rounding of the two norms, and likewise for c.
// The product of the (p + 1)-vectors in float32 adds (p + 3) u (1 + rest_error). A centroid whose bound stays below the
// score of the row's previous centroid by more than the doubt of all these terms together cannot be the nearest, nor tie
// with it. Centroids are means, so r_c is small, and a few dozen leading directions of the *centroids* exclude most
// pairs. Any previous labels are right.
//
// PAIR BOUND. Where no few directions hold the centroids, a dense pass leaves q(x, c) <= scale |x - c|^2 for every pair, as
// float16 rounded towards zero. Later, when c has gone to c' with |c' - c| <= m(c), the triangle inequality says
// |x - c'| >= |x - c| - m(c), so c' can be nearest or tie only if sqrt(q / scale) <= r(x) + m(c), where r(x) is at least the
// distance to the row's previous centroid, where that is now, and the width of a tie. Reading q costs two bytes a pair.
//
// SETTLED ROWS. A row whose centroid was nearest by more than a tie, and has not moved since, can only be taken by one
// that has. Ties are measured from the centroids' mean, m: |x - m|^2 + max |c - m|^2 <= 2 |x|^2 + 6 C^2, as |m| <= C. The
// doubt above, 16e-12 of |x|^2 + C^2 in squared distances, stays more than that as long as C has not grown by a fifth.
//
// Threads take runs of rows; each row is computed by one thread in one order, so their number changes no byte.

#include <cstdint>
#include <cstdlib>

#include <algorithm>
#include <atomic>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "written for GCC on x86-64; without it ktransfer clusters by a dense product in numpy"
#endif
#include <immintrin.h>

namespace {

constexpr int64_t CHUNK = 256;  // exact.py counts on it
constexpr double TIE = 1e-12;
constexpr int64_t CACHED = 1 << 19;  // bytes of rows that stay in a core's own cache beside all else

// The fields mirror `Job` in native.py.
struct Job {
    int64_t rows, d, k, p;
    const float* x;          // rows x d
    const float* origin;     // d, on which the bounds are centred; kept as long as rows projected from it
    const float* middle;     // d, the mean of the centroids: near-ties are decided from there
    const float* raw;        // k x d, the centroids themselves
    const float* centroids;  // k x d, centred
    const float* packed;     // panels of what is multiplied: centroids, their projections, or the basis
    const float* bias;       // k, padded with -inf to whole panels
    uint16_t* bounds;        // rows x k (whole panels), float16: scaled lower bounds of squared distances, or none
    const float* moved;      // k (whole panels): how far each centroid is from where it was then, scaled, rounded up
    float* projected;        // rows x (p + 2): coefficients, norm of the rest, norm of the row
    const int64_t* order;    // the order in which rows are worked on
    const int32_t* some;     // few, ascending: the only centroids that can take rows from their own; none: all can
    const float* some_bias;  // few (whole panels)
    int64_t few;
    uint8_t* clear;          // rows, or none: whether every other centroid was farther by more than the width of a tie
    const double* weights;   // rows, or none: all are 1
    int32_t* labels;         // rows: previous ones where a bound uses them, then the answer
    float* distances;        // rows
    double* sums;            // k x d
    float longest, dense_error, dot_error, filter_error, rest_error, tiny, floor;
    float scale;             // of the bounds, an even power of two
    double widest;           // the largest |c - middle|^2

    float doubt(float length, float error) const {
        length += floor;  // the squares behind it may have underflowed
        return 2 * error * (length * longest + longest * longest / 2) +
               8 * float(TIE) * (length * length + longest * longest) + tiny;
    }
    // At most the score of a row's centroid, from the squared distance that an earlier pass measured.
    float own(float length, float distance) const {
        return (length * length - distance) / 2 - dot_error * (length * length + longest * longest) - tiny;
    }
    // What |x|^2 - 2 s may be wrong by as a squared distance, and the width of a tie.
    float distance_doubt(float length) const {
        return 2 * doubt(length, std::max(dense_error, dot_error)) + 3 * dot_error * length * length;
    }
    // Whether squared distances may come near the largest float32: then bounds of pairs say nothing.
    bool too_far(float length) const { return !((length + longest) * (length + longest) < 1e38f); }
};

template <class F>
void in_threads(int threads, F work) {
    std::vector<std::thread> others;
    for (int t = 1; t < threads; t++) {
        try {
            others.emplace_back(work, t);
        } catch (const std::system_error&) {  // no more threads here
            work(t);
        }
    }
    work(0);
    for (auto& other : others) other.join();
}

}  // namespace

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
constexpr int W = 8, MR = 6;
typedef uint16_t Word;
#define NOT_LESS(s, t) uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)(s), (__m256)(t), _CMP_NLT_UQ)))
static inline float fold(__m256 v) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
#define SUM(v) fold((__m256)(v))
#define STORE_HALF(p, v) \
    _mm_storeu_si128((__m128i*)(p), _mm256_cvtps_ph((__m256)(v), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC))
#define LOAD_HALF(p) V(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p))))
#include "exact_kernels.hpp"
#undef NOT_LESS
#undef SUM
#undef STORE_HALF
#undef LOAD_HALF
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
namespace avx512 {
constexpr int W = 16, MR = 12;
typedef uint32_t Word;
#define NOT_LESS(s, t) uint32_t(_mm512_cmp_ps_mask((__m512)(s), (__m512)(t), _CMP_NLT_UQ))
static inline float fold(__m512 v) {
    const __m256* halves = reinterpret_cast<const __m256*>(&v);
    return avx2::fold(_mm256_add_ps(halves[0], halves[1]));
}
#define SUM(v) fold((__m512)(v))
#define STORE_HALF(p, v) \
    _mm256_storeu_si256((__m256i*)(p), _mm512_cvtps_ph((__m512)(v), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC))
#define LOAD_HALF(p) V(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)(p))))
#include "exact_kernels.hpp"
#undef NOT_LESS
#undef SUM
#undef STORE_HALF
#undef LOAD_HALF
}  // namespace avx512
#pragma GCC pop_options

namespace {

enum Kind { DENSE, FILTERED, PROJECT, PAIRED, GUESS };

template <class T>
T* room(std::vector<std::unique_ptr<void, decltype(&std::free)>>& all, int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 127) / 64 * 64;
    all.emplace_back(std::aligned_alloc(64, bytes), &std::free);
    return static_cast<T*>(all.back().get());
}

#define RUN(SET)                                                                                                     \
    using namespace SET;                                                                                             \
    const int64_t width = kind == FILTERED || kind == GUESS ? job.p + 1 : job.d, panels = (job.k + NR - 1) / NR;     \
    /* Rows are looked at several times under bounds, and should stay in the cache meanwhile. */                     \
    const int64_t few = std::max<int64_t>(2, CACHED / (4 * job.d + 4) / MR) * MR;                                    \
    const int64_t step = kind == FILTERED || kind == PAIRED ? std::min<int64_t>(ROWS, few) : ROWS;                   \
    std::atomic<int64_t> next{0}, dots{0};                                                                           \
    std::atomic<bool> full{false};                                                                                   \
    in_threads(threads, [&](int) {                                                                                   \
        std::vector<std::unique_ptr<void, decltype(&std::free)>> all;                                                \
        Scratch s{room<float>(all, ROWS * width),      room<float>(all, ROWS * GROUP), room<float>(all, job.d),      \
                  room<Best>(all, ROWS),               room<float>(all, ROWS),         room<float>(all, ROWS),       \
                  room<Bits>(all, ROWS * panels),      room<int64_t>(all, ROWS),       room<float>(all, job.k + 4),  \
                  room<int32_t>(all, job.k)};                                                                        \
        for (auto& part : all)                                                                                       \
            if (!part) full = true;                                                                                  \
        if (full) return;                                                                                            \
        for (int64_t start; (start = next.fetch_add(step)) < job.rows;) {                                            \
            const int64_t count = std::min(step, job.rows - start);                                                  \
            for (int64_t i = 0; i < count; i++) s.places[i] = job.order ? job.order[start + i] : start + i;          \
            dots += kind == DENSE      ? dense(s, job, count)                                                        \
                    : kind == FILTERED ? filtered(s, job, count)                                                     \
                    : kind == PAIRED   ? paired(s, job, count)                                                       \
                    : kind == GUESS    ? guess(s, job, count)                                                        \
                                       : project(s, job, count);                                                     \
        }                                                                                                            \
    });                                                                                                              \
    return full ? -1 : int64_t(dots);

}  // namespace

extern "C" {

// 2: AVX-512, 1: AVX2 with FMA, 0: neither. Processors with AVX2 convert float16 as well.
int ktransfer_level() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// What native.py describes must be what was compiled: an extension of older sources is not used.
int64_t ktransfer_job_bytes() { return sizeof(Job); }

// Centroids in a panel; `packed` and `bias` are padded to whole panels.
int64_t ktransfer_panel(int level) { return level == 2 ? avx512::NR : avx2::NR; }

void ktransfer_pack(int level, int64_t k, int64_t d, const float* from, float* to) {
    if (level == 2)
        avx512::pack(k, d, from, to);
    else
        avx2::pack(k, d, from, to);
}

// Work on all rows of a block; the number of full-length products that finished survivors, or -1: out of memory.
int64_t ktransfer_run(int level, int threads, int kind, const Job* given) {
    const Job& job = *given;
    if (level == 2) {
        RUN(avx512)
    }
    RUN(avx2)
}

// Rows in the order of their labels, then of their places.
void ktransfer_order(int64_t rows, int64_t k, const int32_t* labels, int64_t* order) {
    std::vector<int64_t> at(size_t(k) + 1);
    for (int64_t i = 0; i < rows; i++) at[size_t(labels[i]) + 1]++;
    for (size_t c = 1; c <= size_t(k); c++) at[c] += at[c - 1];
    for (int64_t i = 0; i < rows; i++) order[at[size_t(labels[i])]++] = i;
}

// The rows added to the sums of their clusters in the order of `order`, which is sorted by label and, within a label, by
// row. So sums do not depend on blocks or threads.
void ktransfer_update(int level, int threads, const Job* given) {
    const Job& job = *given;
    in_threads(threads, [&](int t) {
        const int64_t start = job.rows * t / threads, stop = job.rows * (t + 1) / threads;
        auto edge = [&](int64_t i) {
            while (i > 0 && i < job.rows && job.labels[job.order[i]] == job.labels[job.order[i - 1]]) i++;
            return i;
        };
        for (int64_t i = edge(start), end = edge(stop), count; i < end; i += count) {
            const float* rows[4];
            double weights[4];
            const int32_t label = job.labels[job.order[i]];
            for (count = 0; count < 4 && i + count < end && job.labels[job.order[i + count]] == label; count++) {
                rows[count] = job.x + job.order[i + count] * job.d;
                weights[count] = job.weights ? job.weights[job.order[i + count]] : 1;
            }
            for (int64_t j = i + count; j < end && j < i + count + 4; j++)
                avx2::fetch(job.x + job.order[j] * job.d, 4 * job.d);
            double* sum = job.sums + int64_t(label) * job.d;
            if (level == 2)
                avx512::add(sum, rows, weights, count, job.d);
            else
                avx2::add(sum, rows, weights, count, job.d);
        }
    });
}

}  // extern "C"
