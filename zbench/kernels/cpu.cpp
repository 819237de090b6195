// A whole decoder forward over Rows for CPUs: weights streamed once, one thread team, one call per forward.
//
// Every output is accumulated in float32 in an order that depends on neither the number of rows nor the number of
// threads: projections sum over k in sequence, scores over the head size in sequence, values over keys in sequence
// (an invisible key adds exactly zero). A token therefore gets bit-identical logits whether it is decoded alone or
// verified among others, which is what makes "lossless" checkable to the bit, in bfloat16 too.
//
// Weights and keys are stored in panels of 16 outputs (keys) so that one cache line feeds 16 lanes without any
// horizontal sum:   bfloat16 [N/16][K/2][16][2]   float32 [N/16][K][16]   keys [.., S/16, d/U, 16, U], U as in Acts.
// Written with the compiler's vector extensions; intrinsics only for what they cannot say: a fused multiply-add that
// is fused everywhere alike (the build forbids the compiler to contract on its own), and AVX512-BF16's dot product.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <sched.h>
#include <utility>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
constexpr int P = 16;         // outputs (or keys) per panel
constexpr int NV = P / VL;    // vectors per panel
constexpr bool WIDE = VL == 16;
#if defined(__AVX512BF16__)
constexpr bool DOT = true;
#else
constexpr bool DOT = false;
#endif
constexpr int STREAMED = 4;   // the most rows for which the hardware alone fetches weights in time
constexpr int AHEAD = 8192;   // bytes; half as far is far slower

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef vf vf_mem __attribute__((aligned(4), may_alias));
typedef vu vu_mem __attribute__((aligned(4), may_alias));
typedef vh vh_mem __attribute__((aligned(2), may_alias));
typedef uint8_t vb __attribute__((vector_size(VL)));
typedef vb vb_mem __attribute__((aligned(1), may_alias));
typedef uint16_t bf16;

static inline vf load(const float* p) { return *(const vf_mem*)p; }
static inline void store(float* p, vf v) { *(vf_mem*)p = v; }
static inline vf splat(float x) { return x - vf{}; }
#if defined(__AVX512F__)
static inline vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX__) && defined(__FMA__)
static inline vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
static inline vf fma(vf a, vf b, vf c) { return a * b + c; }
#endif
static inline float widen(bf16 x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
static inline float widen(float x) { return x; }
static inline bf16 narrow(float x) {
    uint32_t u; memcpy(&u, &x, 4);
    return (bf16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline vf load_wide(const bf16* p) { return (vf)(__builtin_convertvector(*(const vh_mem*)p, vu) << 16); }
static inline vf load_wide(const float* p) { return load(p); }
static inline void put(bf16* p, float x) { *p = narrow(x); }
static inline void put(float* p, float x) { *p = x; }

// exp on float32 lanes, relative error about 2e-7 (Cephes' minimax polynomial); inputs clamped to the finite range.
static inline vf vexp(vf x) {
    x = x < splat(-87.3f) ? splat(-87.3f) : x;
    x = x > splat(88.3f) ? splat(88.3f) : x;
    vf z = x * 1.44269504088896341f;
    vi n = __builtin_convertvector(z + (z < vf{} ? splat(-0.5f) : splat(0.5f)), vi);
    vf f = __builtin_convertvector(n, vf);
    vf r = fma(f, splat(2.12194440e-4f), fma(f, splat(-0.693359375f), x));
    vf y = fma(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
    y = fma(y, r, splat(8.3334519073e-3f));
    y = fma(y, r, splat(4.1665795894e-2f));
    y = fma(y, r, splat(1.6666665459e-1f));
    y = fma(y, r, splat(5.0000001201e-1f));
    y = fma(y, r * r, r + 1.0f);
    return (vf)((vi)y + (n << 23));
}

// A barrier that spins for some microseconds and then gives its core away. OpenMP's own keeps spinning, and where the
// machine is busy with something else the thread that is waited for does not run: a forward then took 100 times as long.
struct Barrier {
    std::atomic<int> arrived{0}, round{0};
    void wait(int threads) {
        int now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
            if (spins > 2000) sched_yield();
#if defined(__x86_64__)
            else __builtin_ia32_pause();
#endif
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------
// Projections. Activations are what the weight's type multiplies: bfloat16 weights take activations rounded to
// bfloat16 (kept as float32 where there is no dot-product instruction), float32 weights take float32.

template <class W> struct Act { typedef float type; };
#if defined(__AVX512BF16__)
template <> struct Act<bf16> { typedef bf16 type; };
#endif
template <class W> using act_t = typename Act<W>::type;

static inline void put_act(bf16* p, float x, bf16) { *p = narrow(x); }
static inline void put_act(float* p, float x, bf16) { *p = widen(narrow(x)); }
static inline void put_act(float* p, float x, float) { *p = x; }

// The rows of one input, interleaved within tiles of `height` rows [M/height][K/U][height][U], so that a tile reads all
// its rows from one stream at constant offsets. U = 2 where the dot product takes pairs.
template <class W> struct Acts {
    static constexpr int U = sizeof(act_t<W>) == 2 ? 2 : 1;
    act_t<W>* a; int64_t K; int height;
    INLINE_MEMBER act_t<W>* tile(int m) const { return a + (int64_t)(m / height) * height * K; }
    INLINE_MEMBER void put(int m, int64_t k, float x) const {
        put_act(tile(m) + (k / U * height + m % height) * U + k % U, x, W{});
    }
    INLINE_MEMBER void put(int m, int64_t k, vf x) const {  // VL neighbours
        act_t<W>* to = tile(m) + (k / U * height + m % height) * U;
#if defined(__AVX512BF16__)
        if constexpr (U == 2) {
            alignas(32) int32_t pairs[VL / 2];
            _mm256_store_si256((__m256i*)pairs, (__m256i)_mm512_cvtneps_pbh((__m512)x));
            UNROLL for (int i = 0; i < VL / 2; i++) memcpy(to + i * U * height, pairs + i, 4);
            return;
        }
#endif
        for (int i = 0; i < VL; i++) put_act(to + (int64_t)i * height, x[i], W{});
    }
};

// f(0), .., f(N - 1) with constants, so that the arrays they index live in registers.
template <class F, int... I> INLINE void unrolled(F f, std::integer_sequence<int, I...>) { (f(std::integral_constant<int, I>{}), ...); }
template <int N, class F> INLINE void unrolled(F f) { unrolled(f, std::make_integer_sequence<int, N>{}); }
#define EACH(i) [&](auto i) __attribute__((always_inline))

// The arithmetic of many rows hides the way from memory only if what follows is on it already.
INLINE void fetch_ahead(const void* w) { __builtin_prefetch((const char*)w + AHEAD, 0, 2); }

// acc[m][n] += sum_k x[m][k] * w[k][n] for MR rows of a tile `height` rows tall and COUNT neighbouring panels, of which
// the first is number FROM of the accumulators' NP.
template <int NP, int MR, int FROM = 0, int COUNT = NP>
INLINE void dot(const float* w, const float* x, int height, int K, vf* acc) {
    constexpr int N = COUNT * NV;
    for (int k = 0; k < K; k++, x += height) {
        vf wv[N];
        // (On a CPU with the dot product this was not measured.)
        if (!DOT && MR > STREAMED) unrolled<COUNT>(EACH(p) { fetch_ahead(w + ((int64_t)p * K + k) * P); });
        unrolled<N>(EACH(n) { wv[n] = load(w + ((int64_t)(n / NV) * K + k) * P + n % NV * VL); });
        unrolled<MR>(EACH(m) {
            vf xv = splat(x[m]);
            unrolled<N>(EACH(n) { vf& to = acc[m * NP * NV + FROM * NV + n]; to = fma(wv[n], xv, to); });
        });
    }
}

#if defined(__AVX512BF16__)
INLINE void add_products(__m512bh w, const bf16* pair, vf& to) {  // to += w . the pair, in every lane
    // GCC does not fold a broadcast into this instruction by itself.
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(to) : "v"(w), "m"(*(const bf16(*)[2])pair));
}

template <int NP, int MR, int FROM = 0, int COUNT = NP>
INLINE void dot(const bf16* w, const bf16* x, int height, int K, vf* acc) {
    static_assert(COUNT == 1, "see panels()");
    for (int k = 0; k < K; k += 2, w += 2 * P, x += 2 * height) {
        const __m512bh wv = (__m512bh)_mm512_loadu_si512(w);
        if (MR > STREAMED) fetch_ahead(w);
        unrolled<MR>(EACH(m) { add_products(wv, x + 2 * m, acc[m * NP + FROM]); });
    }
}
#else
template <int NP, int MR, int FROM = 0, int COUNT = NP>
INLINE void dot(const bf16* w, const float* x, int height, int K, vf* acc) {
    constexpr int N = COUNT * NV;
    const vu upper = 0xffff0000u - vu{};
    for (int k = 0; k < K; k += 2, x += 2 * height) {
        vf half[N];
        auto pairs = EACH(n) { return *(const vu_mem*)(w + ((int64_t)(n / NV) * K + k) * P + n % NV * 2 * VL); };
        auto add = EACH(m) {
            vf xv = splat(x[m]);
            unrolled<N>(EACH(n) { vf& to = acc[m % MR * NP * NV + FROM * NV + n]; to = fma(half[n], xv, to); });
        };
        if (MR > STREAMED) unrolled<COUNT>(EACH(p) { fetch_ahead(w + ((int64_t)p * K + k) * P); });
        unrolled<N>(EACH(n) { half[n] = (vf)(pairs(n) << 16); });
        unrolled<MR>(add);
        x += height;
        unrolled<N>(EACH(n) { half[n] = (vf)(pairs(n) & upper); });
        unrolled<MR>(add);
        x -= height;
    }
}
#endif

// What multiplies rows: packed weights, and the second half of a low-rank update, whose first half is done.
template <class W> struct Matrix {
    const W* w;
    const W* b = nullptr;             // [N/16][rank] panels, or null
    const int32_t* source = nullptr;  // per panel: the column of `inner` where its `rank` begin, -1: it has none
    int rank = 0;
    Acts<W> inner{};                  // A x, zeros where a row is no mask
};

// out[m * ld + n] = (w x)[m][n], plus b A x, for rows m0..m0+MR of one tile and NP panels. Not inlined: what becomes of
// the result would multiply its instantiations, and they are what takes long to compile.
template <int NP, int MR, class W>
static __attribute__((noinline)) void tile(const Matrix<W>& by, const Acts<W>& x, int m0, int panel, vf* out, int ld) {
    constexpr int N = NP * NV;
    vf acc[MR * N];
    unrolled<MR * N>(EACH(i) { acc[i] = vf{}; });
    dot<NP, MR>(by.w + (int64_t)panel * x.K * P, x.tile(m0), x.height, (int)x.K, acc);
    if (by.b) unrolled<NP>(EACH(p) {
        const int from = by.source[panel + p];
        if (from >= 0)
            dot<NP, MR, p, 1>(by.b + (int64_t)(panel + p) * by.rank * P, by.inner.tile(m0) + (int64_t)from * x.height, x.height, by.rank, acc);
    });
    unrolled<MR * N>(EACH(i) { out[i / N * ld + i % N] = acc[i]; });
}

// Panels per tile for MR rows: as many accumulators as the register file holds (16 registers with AVX, 32 with AVX512).
// Tall tiles read each weight once for all their rows, so that memory streams while the arithmetic runs. With the dot
// product memory binds, or nearly, and one panel after another is one stream for the prefetchers.
template <int MR, class W> constexpr int panels() {
    if (!WIDE) return MR == 1 ? 4 : MR == 2 ? 2 : 1;
    if (Acts<W>::U == 2) return 1;
    return MR == 1 ? 8 : MR <= 6 ? 4 : MR <= 12 ? 2 : 1;
}
constexpr int TALL = WIDE ? 16 : 5;
constexpr int SLICE = 4;  // panels

// Hands `out` the finished rows m0..m0+MR of max(NP, STEP) panels.
template <int NP, int MR, int STEP, class W, class Out>
INLINE void emit(const Matrix<W>& by, const Acts<W>& x, int m0, int panel, Out& out) {
    constexpr int Q = NP > STEP ? NP : STEP;
    vf done[MR * Q * NV];
    for (int q = 0; q < Q; q += NP) tile<NP, MR>(by, x, m0, panel + q, done + q * NV, Q * NV);
    for (int m = 0; m < MR; m++) out.template panels<Q>(m0 + m, panel, done + m * Q * NV);
}

// Panels [p0, p1) for the tile of `rows` rows that begins at row m0.
template <int MR, int STEP, class W, class Out>
static inline void sweep(int rows, const Matrix<W>& by, const Acts<W>& x, int m0, int p0, int p1, Out& out) {
    if (rows == MR) {
        constexpr int NP = panels<MR, W>(), Q = NP > STEP ? NP : STEP;
        int p = p0;
        for (; p + Q <= p1; p += Q) emit<NP, MR, STEP>(by, x, m0, p, out);
        for (; p < p1; p += STEP) emit<1, MR, STEP>(by, x, m0, p, out);
    } else if constexpr (MR > 1) {
        sweep<MR - 1, STEP>(rows, by, x, m0, p0, p1, out);
    }
}

// Rows of a tile for M rows in all: as few tiles as can be, equally tall.
static inline int height(int M) { int tiles = M ? (M + TALL - 1) / TALL : 1; return (M + tiles - 1) / tiles; }

// One thread's share of out(m, n) = x[M,K] . w[N,K]^T. STEP = 2 hands over (gate, up) panel pairs together.
template <int STEP, class W, class Out>
static void project(const Matrix<W>& by, const Acts<W>& x, int M, int N, int thread, int threads, Out out) {
    int groups = (N + P * STEP - 1) / (P * STEP);
    int first = (int)((int64_t)groups * thread / threads) * STEP, last = (int)((int64_t)groups * (thread + 1) / threads) * STEP;
    // Rows outermost only within a slice of panels that stays in the cache, so that weights leave memory once.
    int slice = M <= TALL ? last - first : SLICE * STEP;
    for (int p0 = first; p0 < last; p0 += slice) {
        int p1 = p0 + slice < last ? p0 + slice : last;
        for (int m = 0; m < M; m += x.height) sweep<TALL, STEP>(M - m < x.height ? M - m : x.height, by, x, m, p0, p1, out);
    }
}

static inline void put_lanes(float* row, int n, int N, vf v) {
    if (n + VL <= N) store(row + n, v);
    else for (int i = 0; n + i < N; i++) row[n + i] = v[i];
}

static inline vf plus(vf x, const float* bias, int n) { return bias ? x + load(bias + n) : x; }

struct Assign {  // y = x W^T + bias
    float* y; int64_t ldy; int N; const float* bias;
    template <int NP> INLINE_MEMBER void panels(int m, int panel, const vf* acc) {
        UNROLL for (int v = 0; v < NP * NV; v++) {
            int n = panel * P + v * VL;
            put_lanes(y + m * ldy, n, N, plus(acc[v], bias, n));
        }
    }
};

struct Accumulate {  // y += x W^T + bias   (N is a multiple of VL: the model's width)
    float* y; int64_t ldy; const float* bias;
    template <int NP> INLINE_MEMBER void panels(int m, int panel, const vf* acc) {
        UNROLL for (int v = 0; v < NP * NV; v++) {
            int n = panel * P + v * VL;
            float* out = y + m * ldy + n;
            store(out, load(out) + plus(acc[v], bias, n));
        }
    }
};

template <class W> struct Feed {  // x W^T of mask rows as the input of a further product, zeros of all others
    Acts<W> a; const int64_t* masks;
    template <int NP> INLINE_MEMBER void panels(int m, int panel, const vf* acc) {
        UNROLL for (int v = 0; v < NP * NV; v++) a.put(m, panel * P + v * VL, masks[m] >= 0 ? acc[v] : vf{});
    }
};

template <class W> struct Gate {  // a = silu(gate) * up; panels alternate gate, up
    Acts<W> a; const float* bias;
    template <int NP> INLINE_MEMBER void panels(int m, int panel, const vf* acc) {
        for (int p = 0; p < NP; p += 2) for (int v = 0; v < NV; v++) {
            int n = (panel + p) * P + v * VL;
            vf g = plus(acc[p * NV + v], bias, n), u = plus(acc[(p + 1) * NV + v], bias, n + P);
            a.put(m, (panel + p) / 2 * P + v * VL, g / (1.0f + vexp(-g)) * u);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------
// The model, as the caller lays it out (mirrored field by field in cpu.py).

extern "C" {
struct zb_layer {
    const void *qkv, *out, *gate_up, *down;                        // packed weights
    const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias;   // or null
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm;      // last two or null
    int64_t window;                                                // 0: attend to all
};
struct zb_model {
    int64_t layers, width, ffn, heads, kv_heads, head_dim, vocab, bf16_weights;
    double eps;
    const zb_layer* layer;
    const void *embedding, *head;  // embedding [V, D] plain; head packed
    const float *norm, *inv_freq;
};
struct zb_low_rank {      // of projections that read the same input; a null: none
    const void *a, *b;    // packed [columns, K], columns a multiple of 16, and panels [N/16][rank] (see Matrix)
    const int32_t* source;
    int64_t rank, columns;
};
struct zb_adapter {  // acts on mask rows only
    const zb_low_rank *qkv, *out, *gate_up, *down;  // per layer
    const float* mask_embedding;                    // [masks, D]; the last serves all further ones
    int64_t masks;
};
struct zb_context {  // of DFlash (formulas: models/dflash.py): what the hidden states of another model become
    int64_t taps;
    const void *fc, *kv;            // packed [D, taps D] and [L 2 G d, D]: of each layer keys, then values
    const float *norm, *key_norms;  // [D], [L, d]
};
struct zb_batch {
    int64_t batch, rows, capacity, wanted, captures, threads;
    const int64_t *ids, *positions, *lengths;   // [B,R] [B,R] [B]; no positions: tokens in a row
    const uint8_t* visible;                     // [B,R,R]; or null: rows see each other
    const int64_t* masks;                       // [B,R]: which mask of its block a row is, -1 for a token; or null
    const zb_adapter* adapter;                  // or null
    void *keys, *values;                        // [L,B,kv,S/16,d,16] and [L,B,kv,S,d]
    const int64_t *logit_rows, *capture_layers; // flat row indices; hidden-state indices, ascending
    float *logits, *captured;                   // [wanted,V], [captures,B*R,D]
    int64_t* likeliest;                         // [wanted]; or null
    const zb_context* context;                  // read before the rows; or null
    const float* const* taps;                   // each [B,unread,D]
    const int64_t* counts;                      // [B]: so many of them are real, the last tokens that `lengths` counts
    int64_t unread;
    void* workspace;
    int64_t workspace_bytes;
    int64_t* times;                             // ns of the steady clock at the start and after each section; or null
};
}

struct Workspace {
    char* at; int64_t left; bool ok = true; int64_t needed = 0;
    template <class T> T* take(int64_t n) {
        int64_t bytes = (n * (int64_t)sizeof(T) + 63) / 64 * 64;
        needed += bytes;
        if (bytes > left) { ok = false; return nullptr; }
        T* p = (T*)at; at += bytes; left -= bytes; return p;
    }
};

static float mean_square(const float* x, int n) {
    vf s = {};
    int i = 0;
    for (; i + VL <= n; i += VL) { vf v = load(x + i); s = fma(v, v, s); }
    float t = 0;
    for (int l = 0; l < VL; l++) t += s[l];
    for (; i < n; i++) t += x[i] * x[i];
    return t / n;
}

// One thread's share of y[m] = x(m) / rms(x(m)) * weight for M rows. Rows of one tile lie within each other's cache
// lines, so threads take whole tiles or, where there are too few, columns of all rows.
template <class W, class Rows>
static void normalise(Rows x, const float* weight, float eps, int n, const Acts<W>& y, int M, int thread, int threads) {
    int tiles = (M + y.height - 1) / y.height, m0 = 0, m1 = M, i0 = 0, i1 = n;
    if (tiles >= threads) {
        m0 = tiles * thread / threads * y.height;
        m1 = tiles * (thread + 1) / threads * y.height;
        m1 = m1 < M ? m1 : M;
    } else {
        i0 = n / VL * thread / threads * VL;
        i1 = n / VL * (thread + 1) / threads * VL;
    }
    for (int m = m0; m < m1; m++) {
        const float* row = x(m);
        float scale = 1.0f / sqrtf(mean_square(row, n) + eps);
        for (int i = i0; i < i1; i += VL) y.put(m, i, load(row + i) * scale * load(weight + i));
    }
}

// One thread's share of y[m] = x(m), columns of all rows.
template <class W, class Rows>
static void place(Rows x, int n, const Acts<W>& y, int M, int thread, int threads) {
    for (int m = 0; m < M; m++)
        for (int i = n / VL * thread / threads * VL; i < n / VL * (thread + 1) / threads * VL; i += VL) y.put(m, i, load(x(m) + i));
}

static int64_t first_largest(const float* x, int64_t n) {
    constexpr int STREAMS = 4;
    constexpr int64_t BLOCK = 16 * STREAMS * VL;
    float top = -INFINITY;
    int64_t at = 0, i = 0;  // where it is, or the block that holds it
    for (; i + BLOCK <= n; i += BLOCK) {
        vf most[STREAMS];
        UNROLL for (int s = 0; s < STREAMS; s++) most[s] = splat(-INFINITY);
        for (int64_t k = i; k < i + BLOCK; k += STREAMS * VL)
            UNROLL for (int s = 0; s < STREAMS; s++) { vf v = load(x + k + s * VL); most[s] = v > most[s] ? v : most[s]; }
        UNROLL for (int s = 1; s < STREAMS; s++) most[0] = most[s] > most[0] ? most[s] : most[0];
        float here = most[0][0];
        for (int l = 1; l < VL; l++) here = most[0][l] > here ? most[0][l] : here;
        if (here > top) { top = here; at = i; }
    }
    for (; i < n; i++) if (x[i] > top) { top = x[i]; at = i; }
    if (top == -INFINITY) return 0;
    while (x[at] != top) at++;
    return at;
}

static void turn(int64_t position, const float* inv_freq, int half, float* cosine, float* sine) {
    for (int i = 0; i < half; i++) {
        float angle = (float)position * inv_freq[i];
        cosine[i] = cosf(angle);
        sine[i] = sinf(angle);
    }
}

static void rotate(float* x, const float* cosine, const float* sine, int d, const float* norm, float eps) {
    if (norm) {
        float scale = 1.0f / sqrtf(mean_square(x, d) + eps);
        for (int i = 0; i < d; i++) x[i] = x[i] * scale * norm[i];
    }
    int h = d / 2;
    for (int i = 0; i < h; i++) {
        float a = x[i], b = x[i + h];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + h] = b * cosine[i] + a * sine[i];
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Attention of some query vectors, the lanes, that share a KV head and a cache. Scores and weights lie as [panel][lane][16
// keys], so that one lane costs a twelfth of what twelve cost. Weights are summed in the order of the keys: what a row
// sees may lie scattered among drafts that others see, and closer together once it is committed.

constexpr int LANES = 12;        // at a time, at most
constexpr int TILE = LANES * P;  // scores of a panel

template <class W> constexpr int key_unit() { return Acts<W>::U; }  // keys: panels [S/16][d/U][16][U]

// Scores of MR lanes, queries [MR][d], for the keys of KP panels -> scores [KP][..][16].
template <int MR, int KP, class W>
INLINE void dots(const act_t<W>* q, const W* keys, int d, float* scores) {
    constexpr int U = key_unit<W>(), N = KP * NV;
    vf acc[MR * N];
    unrolled<MR * N>(EACH(i) { acc[i] = vf{}; });
    for (int e = 0; e < d; e += U, q += U, keys += U * P) {
#if defined(__AVX512BF16__)
        if constexpr (U == 2) {
            __m512bh k[KP];
            unrolled<KP>(EACH(j) { k[j] = (__m512bh)_mm512_loadu_si512(keys + j * P * (int64_t)d); });
            unrolled<MR>(EACH(m) {
                int32_t pair; memcpy(&pair, q + m * d, 4);
                const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
                unrolled<KP>(EACH(j) { acc[m * KP + j] = (vf)_mm512_dpbf16_ps((__m512)acc[m * KP + j], k[j], x); });
            });
            continue;
        }
#endif
        vf k[N];
        unrolled<N>(EACH(j) { k[j] = load_wide(keys + j / NV * P * (int64_t)d + j % NV * VL); });
        unrolled<MR>(EACH(m) {
            const vf x = splat((float)q[m * d]);
            unrolled<N>(EACH(j) { acc[m * N + j] = fma(k[j], x, acc[m * N + j]); });
        });
    }
    unrolled<MR * N>(EACH(i) { store(scores + i % N / NV * TILE + i / N * P + i % NV * VL, acc[i]); });
}

template <int MR, class W>
static void dots_lanes(int lanes, const act_t<W>* q, const W* keys, int64_t panels, int d, float* scores) {
    constexpr int KP = !WIDE ? 1 : MR > 3 ? 2 : 4;  // enough sums under way to hide the latency of adding
    if (lanes < MR) {
        if constexpr (MR > 1) dots_lanes<MR - 1>(lanes, q, keys, panels, d, scores);
        return;
    }
    int64_t j = 0;
    for (; j + KP <= panels; j += KP) dots<MR, KP>(q, keys + j * P * d, d, scores + j * TILE);
    for (; j < panels; j++) dots<MR, 1>(q, keys + j * P * d, d, scores + j * TILE);
}

// out[m] = sum_t weights[m][t] values[t] / sum_t weights[m][t] for MR lanes and CH vectors of the head size.
template <int MR, int CH, class W>
INLINE void mix(const float* weights, const W* values, int64_t count, int d, float* const* out) {
    vf acc[MR * CH];
    float sums[MR] = {};
    unrolled<MR * CH>(EACH(i) { acc[i] = vf{}; });
    for (int64_t t = 0; t < count; t++, values += d) {
        const float* w = weights + t / P * TILE + t % P;
        vf v[CH];
        unrolled<CH>(EACH(c) { v[c] = load_wide(values + c * VL); });
        unrolled<MR>(EACH(m) {
            vf x = splat(w[m * P]);
            sums[m] += w[m * P];
            unrolled<CH>(EACH(c) { acc[m * CH + c] = fma(v[c], x, acc[m * CH + c]); });
        });
    }
    unrolled<MR * CH>(EACH(i) { store(out[i / CH] + i % CH * VL, acc[i] * splat(1.0f / sums[i / CH])); });
}

template <int MR, class W>
static void mix_lanes(int lanes, const float* weights, const W* values, int64_t count, int d, float* const* out) {
    constexpr int CH = WIDE ? 4 : 2;
    if (lanes < MR) {
        if constexpr (MR > 1) mix_lanes<MR - 1>(lanes, weights, values, count, d, out);
        return;
    }
    for (int c = 0; c < d;) {
        float* at[MR];
        for (int m = 0; m < MR; m++) at[m] = out[m] + c;
        if (d - c >= CH * VL) { mix<MR, CH>(weights, values + c, count, d, at); c += CH * VL; }
        else { mix<MR, 1>(weights, values + c, count, d, at); c += VL; }
    }
}

// f(first lane, lanes) for shares of at most `most` lanes, as even as can be.
template <class F>
static inline void shared_out(int lanes, int most, F f) {
    const int passes = (lanes + most - 1) / most, height = (lanes + passes - 1) / passes;
    for (int m = 0; m < lanes; m += height) f(m, lanes - m < height ? lanes - m : height);
}

// Who sees the slots behind the prefix: sees[m] [own] of each lane, or null for all of them. `oldest` [lanes] is the first
// position inside each lane's sliding window and `positions` [own], both null without one. queries [lanes][d].
template <class W>
static void attend(const act_t<W>* q, int lanes, const uint8_t* const* sees, const int64_t* oldest, const int64_t* positions,
                   int64_t prefix, int own, const W* keys, const W* values, int d, float scale, float* scores, float* const* out) {
    constexpr int HEIGHT = WIDE ? 8 : NV == 2 ? 4 : 2, BLOCK = 8;  // panels whose keys stay in the first-level cache
    // A committed key's slot is its position.
    int64_t total = prefix + own, start = 0;
    if (oldest) {
        start = prefix;
        for (int m = 0; m < lanes; m++) if (oldest[m] < start) start = oldest[m];
        start = start < 0 ? 0 : start / P * P;
    }
    const int64_t count = total - start, panels = (count + P - 1) / P;
    const vf hidden = splat(-INFINITY);
    vf most[LANES];
    for (int m = 0; m < lanes; m++) most[m] = hidden;
    for (int64_t from = 0; from < panels; from += BLOCK) {
        const int64_t end = panels - from < BLOCK ? panels : from + BLOCK;
        shared_out(lanes, HEIGHT, [&](int m, int some) {
            dots_lanes<HEIGHT>(some, q + m * d, keys + (start + from * P) * d, end - from, d, scores + from * TILE + m * P);
        });
        for (int m = 0; m < lanes; m++) {
            const int64_t first = oldest ? oldest[m] : 0;
            vf best = most[m];
            for (int64_t j = from; j < end; j++) {
                float* s = scores + j * TILE + m * P;
                const int64_t slot = start + j * P, after = slot - prefix;
                const bool all = after + P <= 0 && slot >= first;
                uint8_t some[P];
                const uint8_t* seen = some;
                if (!oldest && after >= 0 && slot + P <= total && sees[m]) seen = sees[m] + after;
                else if (!all) for (int i = 0; i < P; i++) {
                    const int64_t t = slot + i;
                    some[i] = t < total && (t < prefix || !sees[m] || sees[m][t - prefix]) && (!oldest || (t < prefix ? t : positions[t - prefix]) >= first);
                }
                UNROLL for (int v = 0; v < NV; v++) {
                    vf x = load(s + v * VL) * scale;
                    if (!all) x = __builtin_convertvector(*(const vb_mem*)(seen + v * VL), vu) != vu{} ? x : hidden;
                    store(s + v * VL, x);
                    best = x > best ? x : best;
                }
            }
            most[m] = best;
        }
    }
    float top[LANES];
    for (int m = 0; m < lanes; m++) {
        top[m] = most[m][0];
        for (int l = 1; l < VL; l++) top[m] = most[m][l] > top[m] ? most[m][l] : top[m];
    }
    for (int64_t j = 0; j < panels; j++)
        for (int i = 0; i < lanes * P; i += VL) {
            float* s = scores + j * TILE + i;
            const vf x = load(s);
            store(s, x == hidden ? vf{} : vexp(x - top[i / P]));
        }
    constexpr int MOST = WIDE ? 6 : 4;  // whose sums fit into the registers
    shared_out(lanes, MOST, [&](int m, int some) {
        mix_lanes<MOST>(some, scores + m * P, values + start * d, count, d, out + m);
    });
}

// A projection with what its low-rank adapter adds on mask rows, if there is one: A x is computed here, B by `tile`. Other
// rows get exact zeros added, so their results are those of the bare model.
template <class W>
static Matrix<W> adapt(const void* w, const zb_low_rank* low, const Acts<W>& x, act_t<W>* between, const int64_t* masks, int M,
                       int thread, int threads, Barrier& team) {
    if (!low || !low->a) return {(const W*)w};
    const Acts<W> inner{between, low->columns, x.height};
    project<1>(Matrix<W>{(const W*)low->a}, x, M, (int)low->columns, thread, threads, Feed<W>{inner, masks});
    team.wait(threads);
    return {(const W*)w, (const W*)low->b, low->source, (int)low->rank, inner};
}

// Who sees the slots that a forward's own rows have: row r of sequence b sees slot j where of[b * sequence + r * row + j] is
// set; without `of`, all see all.
struct Seen {
    const uint8_t* of;
    int64_t sequence, row;
};

// One layer's attention of R rows per sequence over its cache; what every thread does its share of.
template <class W>
struct Attention {
    int B, R, H, G, d;
    int64_t S;             // slots of the cache
    W *keys, *values;      // [B,G,S/16,d,16] and [B,G,S,d]
    float* qkv;            // [B R, (H + 2 G) d]
    int width() const { return (H + 2 * G) * d; }

    // Turn queries and keys, and store keys and values at slot(m), nowhere where that is negative.
    template <class Slot>
    void store(const float* cosine, const float* sine, const float* q_norm, const float* k_norm, float eps, Slot slot, int t, int n) const {
        const int64_t M = (int64_t)B * R;
        for (int64_t i = M * (H + G) * t / n; i < M * (H + G) * (t + 1) / n; i++) {
            const int m = (int)(i / (H + G)), h = (int)(i % (H + G));
            float* x = qkv + (int64_t)m * width() + (int64_t)h * d;
            rotate(x, cosine + (int64_t)m * (d / 2), sine + (int64_t)m * (d / 2), d, h < H ? q_norm : k_norm, eps);
            const int64_t at = h < H ? -1 : slot(m), head = (int64_t)(m / R) * G + h - H;
            if (at < 0) continue;
            constexpr int U = key_unit<W>();
            W* k = keys + head * S * d + at / P * P * d + at % P * U;
            for (int e = 0; e < d; e++) put(k + e / U * U * P + e % U, x[e]);
            W* v = values + (head * S + at) * d;
            for (int e = 0; e < d; e++) put(v + e, x[(int64_t)G * d + e]);
        }
    }

    // Rows see `prefix(b)` slots, and of the `own` behind them those that `sees` says; with a window none older than that.
    // Threads share (row, head) pairs evenly. `mixed` [B R, H d], `scores` and `queries` are scratch of all threads.
    template <class Prefix>
    void attend(Prefix prefix, int own, Seen sees, const int64_t* positions, int64_t window, float scale, float* scores,
                act_t<W>* queries, float* mixed, const Acts<W>& attended, int t, int n) const {
        const int group = H / G, lanes = R * group;  // of a sequence and KV head
        const int64_t every = (int64_t)B * G * lanes, panels = (S + P - 1) / P;
        for (int64_t at = every * t / n, end = every * (t + 1) / n; at < end;) {
            const int head = (int)(at / lanes), from = (int)(at % lanes), b = head / G, g = head % G;
            const int left = (int)(lanes - from < end - at ? lanes - from : end - at), calls = (left + LANES - 1) / LANES;
            const int count = (left + calls - 1) / calls;
            at += count;
            float* out[LANES]; int64_t oldest[LANES]; const uint8_t* seen[LANES];
            const Acts<W> q{queries + (int64_t)t * LANES * d, d, 1};
            for (int c = 0; c < count; c++) {
                const int r = (from + c) / group, h = g * group + (from + c) % group;
                const int64_t m = (int64_t)b * R + r;
                for (int e = 0; e < d; e += VL) q.put(c, e, load(qkv + m * width() + h * d + e));
                out[c] = mixed + m * H * d + h * d;
                seen[c] = sees.of ? sees.of + b * sees.sequence + r * sees.row : nullptr;
                if (window) oldest[c] = positions[m] - window + 1;
            }
            ::attend<W>(q.a, count, seen, window ? oldest : nullptr, window ? positions + (int64_t)b * R : nullptr, prefix(b), own,
                        keys + (int64_t)head * S * d, values + (int64_t)head * S * d, d, scale, scores + t * panels * TILE, out);
            for (int c = 0; c < count; c++) {
                const int64_t to = out[c] - mixed;
                for (int e = 0; e < d; e += VL) attended.put((int)(to / (H * d)), to % (H * d) + e, load(out[c] + e));
            }
        }
    }
};

// Keys and values of all layers for tokens of which only hidden states of another model are read.
template <class W>
struct Context {
    const zb_model& model;
    const zb_batch& batch;
    int D, R, M, fused, pair;  // rows per sequence and in all; columns of all taps, and of a layer's keys and values
    act_t<W> *joined, *normed;
    float *features, *pairs, *cosine, *sine;

    Context(const zb_model& model, const zb_batch& batch, Workspace& space)
        : model(model), batch(batch), D((int)model.width), R(batch.context ? (int)batch.unread : 0), M((int)batch.batch * R),
          fused(batch.context ? (int)batch.context->taps * D : 0), pair((int)(2 * model.kv_heads * model.head_dim)) {
        const int64_t padded = M ? M + TALL : 0;  // the last tile may be only partly filled
        joined = space.take<act_t<W>>(padded * fused);
        normed = space.take<act_t<W>>(padded * D);
        features = space.take<float>((int64_t)M * D);
        pairs = space.take<float>((int64_t)M * pair * model.layers);
        cosine = space.take<float>(M * model.head_dim / 2);
        sine = space.take<float>(M * model.head_dim / 2);
    }

    // One thread's share; `done` ends a section.
    template <class Done>
    void read(int t, int n, Barrier& team, Done done) const {
        const zb_context& by = *batch.context;
        const int L = (int)model.layers, G = (int)model.kv_heads, d = (int)model.head_dim, tall = height(M);
        const float eps = (float)model.eps;
        const Acts<W> x{joined, fused, tall}, y{normed, D, tall};
        auto slot = [&](int m) { return m % R < batch.counts[m / R] ? batch.lengths[m / R] - batch.counts[m / R] + m % R : -1; };
        for (int i = 0; i < by.taps; i++)
            place([&](int m) { return batch.taps[i] + (int64_t)m * D; }, D, Acts<W>{joined + (int64_t)i * D * tall, fused, tall}, M, t, n);
        for (int m = M * t / n; m < M * (t + 1) / n; m++)
            turn(slot(m), model.inv_freq, d / 2, cosine + (int64_t)m * (d / 2), sine + (int64_t)m * (d / 2));
        team.wait(n);
        project<1>(Matrix<W>{(const W*)by.fc}, x, M, D, t, n, Assign{features, D, D, nullptr});
        done();
        normalise([&](int m) { return features + (int64_t)m * D; }, by.norm, eps, D, y, M, t, n);
        done();
        for (int l = 0; l < L; l++)
            project<1>(Matrix<W>{(const W*)by.kv + (int64_t)l * pair * D}, y, M, pair, t, n, Assign{pairs + (int64_t)l * M * pair, pair, pair, nullptr});
        done();
        for (int l = 0; l < L; l++) {
            const int64_t cached = (int64_t)l * batch.batch * G * batch.capacity * d;
            const Attention<W> layer{(int)batch.batch, R, 0, G, d, batch.capacity, (W*)batch.keys + cached, (W*)batch.values + cached, pairs + (int64_t)l * M * pair};
            layer.store(cosine, sine, nullptr, by.key_norms + l * d, eps, slot, t, n);
        }
        done();
    }
};

// Sections end at barriers, so that the first thread's clock is everyone's, or where every thread does the same.
static void stamp(int64_t*& times) {
    if (times) *times++ = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Returns 0, or the bytes that the workspace must have.
template <class W>
static int64_t read(const zb_model& model, const zb_batch& batch) {
    Workspace space{(char*)batch.workspace, batch.workspace_bytes};
    const Context<W> context(model, batch, space);
    if (!space.ok) return space.needed;
    int64_t* times = batch.times;
    stamp(times);
    Barrier team;
#pragma omp parallel num_threads((int)batch.threads)
    {
        const int t = omp_get_thread_num(), n = omp_get_num_threads();
        context.read(t, n, team, [&] { team.wait(n); if (t == 0) stamp(times); });
    }
    return 0;
}

// Returns 0, or the bytes that the workspace must have.
template <class W>
static int64_t forward(const zb_model& model, const zb_batch& batch) {
    const int D = (int)model.width, F = (int)model.ffn, H = (int)model.heads, G = (int)model.kv_heads, d = (int)model.head_dim;
    const int B = (int)batch.batch, R = (int)batch.rows, M = B * R, QKV = (H + 2 * G) * d;
    const int64_t S = batch.capacity;
    const int threads = (int)batch.threads;
    const float eps = (float)model.eps, scale = 1.0f / sqrtf((float)d);
    typedef act_t<W> A;

    Workspace space{(char*)batch.workspace, batch.workspace_bytes};
    float* residual = space.take<float>((int64_t)M * D);
    float* qkv = space.take<float>((int64_t)M * QKV);
    float* mixed = space.take<float>((int64_t)M * H * d);
    // The last tile may be only partly filled.
    // Few rows are normalised by every thread for itself: sharing them had each wait for cache lines of the others twice,
    // those that it read and those that they had written.
    const bool alone = M <= TALL;
    const int64_t inputs = (int64_t)(M + TALL) * (D > H * d ? D : H * d);
    A* act = space.take<A>(inputs * (alone ? threads : 1));
    A* hidden = space.take<A>((int64_t)(M + TALL) * F);
    const int tall = height(M);
    const Acts<W> attended{act, H * d, tall}, gated{hidden, F, tall};
    int64_t columns = 0;
    if (batch.adapter) for (int l = 0; l < model.layers; l++)
        for (const zb_low_rank* low : {batch.adapter->qkv, batch.adapter->out, batch.adapter->gate_up, batch.adapter->down})
            if (low[l].columns > columns) columns = low[l].columns;
    A* between = space.take<A>((int64_t)(M + TALL) * columns);
    float* cosine = space.take<float>((int64_t)M * d / 2);
    float* sine = space.take<float>((int64_t)M * d / 2);
    float* scores = space.take<float>(threads * ((S + P - 1) / P) * TILE);
    A* queries = space.take<A>((int64_t)threads * LANES * d);
    int64_t* positions = space.take<int64_t>(M);
    const Context<W> context(model, batch, space);
    if (!space.ok) return space.needed;
    const int wanted = (int)batch.wanted;
    int64_t* times = batch.times;
    stamp(times);

    Barrier team;
#pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num(), n = omp_get_num_threads();
        const int m0 = (int)((int64_t)M * t / n), m1 = (int)((int64_t)M * (t + 1) / n);
        auto residual_row = [&](int m) { return residual + (int64_t)m * D; };
        auto done = [&] { team.wait(n); if (t == 0) stamp(times); };
        const Acts<W> normed{act + (alone ? t * inputs : 0), D, tall};
        auto normal = [&](const float* weight) {
            normalise(residual_row, weight, eps, D, normed, M, alone ? 0 : t, alone ? 1 : n);
            if (!alone) done();
            else if (t == 0) stamp(times);
        };
        if (batch.context) context.read(t, n, team, done);
        int capture = 0;
        for (int m = m0; m < m1; m++) {
            float* to = residual + (int64_t)m * D;
            int64_t mask = batch.masks ? batch.masks[m] : -1;
            if (mask >= 0 && batch.adapter) {
                mask = mask < batch.adapter->masks ? mask : batch.adapter->masks - 1;
                memcpy(to, batch.adapter->mask_embedding + mask * D, D * 4);
            } else {
                const W* row = (const W*)model.embedding + batch.ids[m] * D;
                for (int i = 0; i < D; i++) to[i] = widen(row[i]);
            }
            positions[m] = batch.positions ? batch.positions[m] : batch.lengths[m / R] + m % R;
            turn(positions[m], model.inv_freq, d / 2, cosine + (int64_t)m * (d / 2), sine + (int64_t)m * (d / 2));
        }
        auto adapted = [&](const void* w, const zb_low_rank* low, const Acts<W>& x) {
            return adapt<W>(w, low, x, between, batch.masks, M, t, n, team);
        };
        done();
        for (int l = 0; l <= model.layers; l++) {
            // Rows m0..m1 of the residual are complete here: the barrier below the down projection saw to that.
            while (capture < batch.captures && batch.capture_layers[capture] == l) {
                memcpy(batch.captured + ((int64_t)capture * M + m0) * D, residual + (int64_t)m0 * D, (int64_t)(m1 - m0) * D * 4);
                capture++;
            }
            if (l == model.layers) break;
            const zb_layer& layer = model.layer[l];
            const zb_adapter* low = batch.masks ? batch.adapter : nullptr;
            const int64_t cached = (int64_t)l * B * G * S * d;
            const Attention<W> attention{B, R, H, G, d, S, (W*)batch.keys + cached, (W*)batch.values + cached, qkv};

            normal(layer.attention_norm);
            project<1>(adapted(layer.qkv, low ? low->qkv + l : nullptr, normed), normed, M, QKV, t, n, Assign{qkv, QKV, QKV, layer.qkv_bias});
            done();
            attention.store(cosine, sine, layer.q_norm, layer.k_norm, eps, [&](int m) { return batch.lengths[m / R] + m % R; }, t, n);
            done();
            attention.attend([&](int b) { return batch.lengths[b]; }, R, {batch.visible, (int64_t)R * R, R}, positions, layer.window,
                             scale, scores, queries, mixed, attended, t, n);
            done();
            project<1>(adapted(layer.out, low ? low->out + l : nullptr, attended), attended, M, D, t, n, Accumulate{residual, D, layer.out_bias});
            done();
            normal(layer.mlp_norm);
            project<2>(adapted(layer.gate_up, low ? low->gate_up + l : nullptr, normed), normed, M, 2 * F, t, n, Gate<W>{gated, layer.gate_up_bias});
            done();
            project<1>(adapted(layer.down, low ? low->down + l : nullptr, gated), gated, M, D, t, n, Accumulate{residual, D, layer.down_bias});
            done();
        }
        // Only the rows that ask for logits pass the final norm and the head.
        const Acts<W> asking{act, D, height(wanted)};
        auto wanted_row = [&](int w) { return residual + batch.logit_rows[w] * D; };
        if (wanted) normalise(wanted_row, model.norm, eps, D, asking, wanted, t, n);
        done();
        if (wanted)
            project<1>(Matrix<W>{(const W*)model.head}, asking, wanted, (int)model.vocab, t, n, Assign{batch.logits, model.vocab, (int)model.vocab, nullptr});
        if (batch.likeliest) {
            done();
            for (int w = wanted * t / n; w < wanted * (t + 1) / n; w++)
                batch.likeliest[w] = first_largest(batch.logits + w * model.vocab, model.vocab);
        }
    }
    stamp(times);
    return 0;
}

extern "C" {
int64_t zb_forward(const zb_model* model, const zb_batch* batch) {
    return model->bf16_weights ? forward<bf16>(*model, *batch) : forward<float>(*model, *batch);
}

// What a forward with a context does before its rows, alone.
int64_t zb_read(const zb_model* model, const zb_batch* batch) {
    return model->bf16_weights ? read<bf16>(*model, *batch) : read<float>(*model, *batch);
}
}

template <class W>
static void linear(const W* w, const float* x, void* scratch, float* y, int M, int N, int K, int threads) {
    const Acts<W> acts{(act_t<W>*)scratch, K, height(M)};
    Barrier team;
#pragma omp parallel num_threads(threads)
    {
        int t = omp_get_thread_num(), n = omp_get_num_threads();
        for (int m = 0; m < M; m++)  // columns of all rows: rows lie within each other's cache lines
            for (int k = K / 2 * t / n * 2, end = t + 1 < n ? K / 2 * (t + 1) / n * 2 : K; k < end; k++)
                acts.put(m, k, x[(int64_t)m * K + k]);
        team.wait(n);
        project<1>(Matrix<W>{w}, acts, M, N, t, n, Assign{y, N, N, nullptr});
    }
}

template <int STREAMS>
static float read_sum(const float* x, int64_t count, int64_t passes, int threads) {
    constexpr int LOADS = STREAMS == 1 ? 8 : 2;  // of a stream at a time; sums enough to hide the latency of adding
    constexpr int64_t BLOCK = LOADS * VL;
    constexpr int64_t AHEAD = 512;  // 2 KiB: what the projections reach with their own prefetches
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        int t = omp_get_thread_num(), n = omp_get_num_threads();
        int64_t length = count / (n * STREAMS) / BLOCK * BLOCK;
        const float* from = x + t * length * STREAMS;
        vf s[STREAMS][LOADS] = {};
        for (int64_t pass = 0; pass < passes; pass++)
            for (int64_t i = 0; i < length; i += BLOCK)
                UNROLL for (int k = 0; k < STREAMS; k++) {
                    const float* at = from + k * length + i;
                    UNROLL for (int v = 0; v < LOADS; v++) {
                        if (STREAMS > 1) __builtin_prefetch(at + AHEAD + v * VL, 0, 2);
                        s[k][v] += load(at + v * VL);
                    }
                }
        for (int k = 0; k < STREAMS; k++) for (int v = 0; v < LOADS; v++) for (int l = 0; l < VL; l++) total += s[k][v][l];
        if (t == 0)
            for (int64_t i = n * STREAMS * length; i < count; i++) total += passes * x[i];
    }
    return total;
}

extern "C" {
// y[M,N] = x[M,K] . w[N,K]^T with w packed; x float32 [M,K]. scratch holds (M + TALL) * K floats.
void zb_linear(const void* w, int64_t is_bf16, const float* x, void* scratch, float* y, int64_t M, int64_t N, int64_t K, int64_t threads) {
    if (is_bf16) linear((const bf16*)w, x, scratch, y, (int)M, (int)N, (int)K, (int)threads);
    else linear((const float*)w, x, scratch, y, (int)M, (int)N, (int)K, (int)threads);
}

// Neighbouring elements of a key that lie together in its panel, for elements of 2 or 4 bytes.
int64_t zb_key_unit(int64_t element) { return element == 2 ? key_unit<bf16>() : key_unit<float>(); }

// Moves cached rows so that the kept ones directly follow the committed prefix: slots[b][i] -> lengths[b] + i.
// slots are absolute, ascending per sequence, -1 ends the list; element is 2 or 4 bytes.
void zb_commit(void* keys, void* values, int64_t element, int64_t L, int64_t B, int64_t G, int64_t S, int64_t d,
               const int64_t* lengths, const int64_t* slots, int64_t most) {
    const int64_t unit = zb_key_unit(element);
    for (int64_t l = 0; l < L; l++) for (int64_t b = 0; b < B; b++) for (int64_t g = 0; g < G; g++) {
        char* k = (char*)keys + ((l * B + b) * G + g) * S * d * element;
        char* v = (char*)values + ((l * B + b) * G + g) * S * d * element;
        for (int64_t i = 0; i < most; i++) {
            int64_t from = slots[b * most + i], to = lengths[b] + i;
            if (from < 0) break;
            if (from == to) continue;
            for (int64_t e = 0; e < d; e += unit)
                memcpy(k + (to / P * P * d + e * P + to % P * unit) * element, k + (from / P * P * d + e * P + from % P * unit) * element, unit * element);
            memcpy(v + to * d * element, v + from * d * element, d * element);
        }
    }
}

// best[r] = the first largest of row r of x [rows, n]; a NaN is never it, and 0 is where there is nothing else.
void zb_argmax(const float* x, int64_t rows, int64_t n, int64_t* best) {
    for (int64_t r = 0; r < rows; r++) best[r] = first_largest(x + r * n, n);
}

// Greedy verification of chains of k drafts [B, k], of which offered[b] are real: what the largest logits [B, 1 + k, V]
// confirm. Rows are `ld` apart from sequence to sequence. Per sequence found [B, 2 K + 2], K = 1 + k: the rows to keep and
// the tokens gained, -1 padded; how many; the last of them, which no draft is. Rows beyond a refusal are not looked at.
void zb_verify_chain(const float* logits, int64_t ld, const int64_t* drafts, int64_t draft_ld, const int64_t* offered,
                     int64_t B, int64_t k, int64_t V, int64_t* found) {
    for (int64_t b = 0; b < B; b++, logits += ld, drafts += draft_ld, found += 2 * k + 4) {
        int64_t *kept = found, *tokens = kept + k + 1, *counts = tokens + k + 1;
        int64_t real = offered && offered[b] < k ? offered[b] : k, row = 0, next = first_largest(logits, V);
        for (; row < real && next == drafts[row]; next = first_largest(logits + row * V, V)) {
            kept[row] = row;
            tokens[row] = next;
            row++;
        }
        kept[row] = row;
        tokens[row] = next;
        counts[0] = row + 1;
        counts[1] = next;
        for (row++; row <= k; row++) kept[row] = tokens[row] = -1;
    }
}

// Greedy verification of trees: ids and parents [B, R], row 0 the last committed token, parents first; a row without a
// parent (-1) is padding. logits [B, R, V], `ld` apart from sequence to sequence; of siblings with one token the first counts.
// Found as above, of which only the rows on the accepted path are looked at.
void zb_verify_tree(const float* logits, int64_t ld, const int64_t* ids, const int64_t* parents, int64_t B, int64_t R, int64_t V,
                    int64_t* found) {
    for (int64_t b = 0; b < B; b++, logits += ld, ids += R, parents += R, found += 2 * R + 2) {
        int64_t *kept = found, *tokens = kept + R, *counts = tokens + R, row = 0, path = 0;
        for (int64_t i = 0; i < R; i++) kept[i] = tokens[i] = -1;
        while (row >= 0) {
            const int64_t next = first_largest(logits + row * V, V), at = row;
            kept[path] = at;
            tokens[path++] = counts[1] = next;
            row = -1;
            for (int64_t i = at + 1; i < R && row < 0; i++)
                if (parents[i] == at && ids[i] == next) row = i;
        }
        counts[0] = path;
    }
}

// The T best of N candidates of a draft as the rows of a forward, after row 0, `last`. candidates, scores, above [B, N]: `above`
// is the number of the candidate that one follows, -1 for row 0, and is smaller than its own. Of equal scores the earlier goes
// first; no candidate scores higher than the one it follows, which is thus among the best too. Rows keep the candidates' order.
// Out: ids, positions, parents [B, 1 + T] and visible [B, 1 + T, 1 + T].
void zb_tree_rows(const int64_t* last, const int64_t* lengths, const int64_t* candidates, const float* scores, const int64_t* above,
                  int64_t B, int64_t N, int64_t T, int64_t* ids, int64_t* positions, int64_t* parents, uint8_t* visible) {
    const int64_t R = T + 1;
    std::vector<int64_t> order(N), row_of(N);
    memset(visible, 0, B * R * R);
    for (int64_t b = 0; b < B; b++, candidates += N, scores += N, above += N, ids += R, positions += R, parents += R, visible += R * R) {
        for (int64_t i = 0; i < N; i++) order[i] = i;
        auto worth = [&](int64_t i) { return scores[i] == scores[i] ? scores[i] : -INFINITY; };  // a NaN would not be ordered
        auto before = [&](int64_t i, int64_t j) { return worth(i) != worth(j) ? worth(i) > worth(j) : i < j; };
        std::nth_element(order.begin(), order.begin() + (T < N ? T : N - 1), order.end(), before);
        std::sort(order.begin(), order.begin() + T);
        std::fill(row_of.begin(), row_of.end(), 0);
        ids[0] = last[b]; positions[0] = lengths[b]; parents[0] = -1; visible[0] = 1;
        for (int64_t r = 1; r < R; r++) {
            const int64_t i = order[r - 1], from = above[i] < 0 ? 0 : row_of[above[i]];
            row_of[i] = r; ids[r] = candidates[i]; positions[r] = positions[from] + 1; parents[r] = from;
            memcpy(visible + r * R, visible + from * R, R);
            visible[r * R + r] = 1;
        }
    }
}

// Streams `count` floats `passes` times with every thread and returns the sum of what was read: the read-bandwidth
// roof, and the caches' where a thread's share of the floats fits into one. A thread follows 8 streams with prefetches, as
// a projection does with its panels, or one that it leaves to the hardware's prefetchers, as one of few rows does: which is
// faster depends on the pages.
float zb_read_sum(const float* x, int64_t count, int64_t passes, int64_t streams, int64_t threads) {
    return streams == 1 ? read_sum<1>(x, count, passes, (int)threads) : read_sum<8>(x, count, passes, (int)threads);
}

const char* zb_instruction_set() { return DOT ? "avx512-bf16" : WIDE ? "avx512" : VL == 8 ? "avx2" : "generic"; }
}

// ---------------------------------------------------------------------------------------------------------------
// The drafter of EAGLE-3 (formulas: models/eagle3.py): a layer that reads tokens beside features, level after level, each
// from what the one before gave. A whole greedy chain is one call: a level of a small drafter takes less than the calls of
// eager torch around it. Rows, threads and the order of sums are as in the decoder above.

extern "C" {
struct zb_drafter {
    int64_t width, ffn, heads, kv_heads, head_dim, vocab, taps, tap_width, bf16_weights;  // vocab: the draft's
    int64_t norm_before_residual, norm_output;
    double eps;
    const void *fc, *qkv, *out, *gate_up, *down, *head;  // packed
    const void* embedding;                               // [V, D] plain
    const float *tap_norms, *joined_norm;                // [taps, tap_width], each tap's and over all; or null
    const float *embedding_norm, *feature_norm, *mlp_norm, *norm, *inv_freq;
    const int64_t* target_ids;                           // [vocab]; or null: draft tokens are the target's
};
struct zb_draft {
    int64_t batch, rows, capacity, before, chain, threads;
    const int64_t *ids, *lengths;  // [B,R] what the first level reads, [B] committed pairs
    const float* const* taps;      // each [B,R,tap_width]: rows are pairs. Null: rows are nodes, `before` others read already
    const uint8_t* visible;        // [B,R,before+R]: which nodes a node sees; null for pairs
    void *keys, *values;           // [B,kv,S/16,d,16] and [B,kv,S,d]: committed pairs, then what is under way
    float* features;               // [B,R,D]: a node's parent's, then the rows' own
    const int64_t* last;           // [B]: the row that the chain follows; null without one
    int64_t* tokens;               // [B,chain,top_k], of the target, the likeliest first; the chain goes on from that
    float* scores;                 // [B,chain,top_k]: the log of the chance of the chain up to there and of each; or null
    int64_t top_k;
    double confidence;             // no level follows where every chain's chance of holding so far is less
    const uint8_t* active;         // [B]: whose chains count for that; null: all
    int64_t* levels;               // how many there were
    void* workspace;
    int64_t workspace_bytes;
    int64_t* times;                // [max(chain, 1), 14] ns of the steady clock, at a level's start and after its sections
};
}

static void normalise(float* x, const float* weight, float eps, int n) {
    float scale = 1.0f / sqrtf(mean_square(x, n) + eps);
    for (int i = 0; i < n; i += VL) store(x + i, load(x + i) * scale * load(weight + i));
}

// The chance that softmax(x) gives to its largest entry.
static float chance(const float* x, float largest, int n) {
    vf sum{};
    int i = 0;
    for (; i + VL <= n; i += VL) sum += vexp(load(x + i) - largest);
    float all = 0;
    for (int l = 0; l < VL; l++) all += sum[l];
    for (; i < n; i++) all += vexp(splat(x[i] - largest))[0];
    return 1.0f / all;
}

// The `most` largest of x [n] in descending order, of equal ones the first first; a NaN comes last. -> where they are, and the
// logs of the chances that softmax(x) gives them.
static void likeliest(const float* x, int64_t n, int64_t most, int64_t* at, float* logs) {
    struct Entry { float value; int64_t at; };
    auto before = [](const Entry& a, const Entry& b) { return a.value != b.value ? a.value > b.value : a.at < b.at; };
    std::vector<Entry> kept;  // a heap, the last of them on top
    kept.reserve(most + 1);
    constexpr int STREAMS = 4;
    constexpr int64_t BLOCK = 4 * STREAMS * VL;
    int64_t i = 0;
    auto look = [&](int64_t end) {
        for (; i < end; i++) {
            const Entry here{x[i] == x[i] ? x[i] : -INFINITY, i};
            if ((int64_t)kept.size() == most && !(here.value > kept[0].value)) continue;
            kept.push_back(here);
            std::push_heap(kept.begin(), kept.end(), before);
            if ((int64_t)kept.size() > most) { std::pop_heap(kept.begin(), kept.end(), before); kept.pop_back(); }
        }
    };
    look(most);
    while (i + BLOCK <= n) {
        vf top[STREAMS];
        UNROLL for (int s = 0; s < STREAMS; s++) top[s] = splat(-INFINITY);
        for (int64_t k = i; k < i + BLOCK; k += STREAMS * VL)
            UNROLL for (int s = 0; s < STREAMS; s++) { vf y = load(x + k + s * VL); top[s] = y > top[s] ? y : top[s]; }
        UNROLL for (int s = 1; s < STREAMS; s++) top[0] = top[s] > top[0] ? top[s] : top[0];
        float best = top[0][0];
        for (int l = 1; l < VL; l++) best = top[0][l] > best ? top[0][l] : best;
        if (best > kept[0].value) look(i + BLOCK);
        else i += BLOCK;
    }
    look(n);
    std::sort_heap(kept.begin(), kept.end(), before);
    const float first = logf(chance(x, kept[0].value, (int)n));
    for (int64_t k = 0; k < most; k++) { at[k] = kept[k].at; logs[k] = kept[k].value - kept[0].value + first; }
}

extern "C" {
// The T likeliest paths through K places whose tokens are independent (models/trees.py), logits [B, K, V], V >= T, as the rows
// of a tree below row 0, `last`: the path of the likeliest tokens comes first and, where `whole`, is kept in full. target_ids
// [V], or null: the tokens' own numbers. usable [B], or null: how many of the K places say something, the others' tokens have
// the log of chance `never`. Out as in zb_tree_rows, and the logs of chance worth [B, 1 + T] of the rows.
void zb_block_tree(const float* logits, int64_t ld, const int64_t* last, const int64_t* lengths, const int64_t* target_ids,
                   const int64_t* usable, int64_t B, int64_t K, int64_t V, int64_t T, int64_t whole, int64_t threads, float never,
                   int64_t* ids, int64_t* positions, int64_t* parents, uint8_t* visible, float* worth) {
    const int64_t R = T + 1;
    std::vector<int64_t> tokens(B * K * T);
    std::vector<float> logs(B * K * T);
    const bool much = B * K * V > 1 << 17;  // else to start threads takes longer
#pragma omp parallel for num_threads((int)threads) if (much)
    for (int64_t i = 0; i < B * K; i++) {
        if (!usable || i % K < usable[i / K]) likeliest(logits + i / K * ld + i % K * V, V, T, &tokens[i * T], &logs[i * T]);
        else for (int64_t k = 0; k < T; k++) { tokens[i * T + k] = k; logs[i * T + k] = never; }
    }

    struct Node { float sum, above; int64_t from, place, rank; bool main; };  // `from` is a node that was taken, -1 row 0
    std::vector<Node> taken, open;
    std::vector<int64_t> row_of(T);
    auto after = [](const Node& a, const Node& b) { return a.sum != b.sum ? a.sum < b.sum : a.main < b.main; };
    for (int64_t b = 0; b < B; b++, ids += R, positions += R, parents += R, worth += R, visible += R * R) {
        const int64_t* token = &tokens[b * K * T];
        float* log = &logs[b * K * T];
        for (int64_t k = 0; whole && k < K && (!usable || k < usable[b]); k++) log[k * T] = 0;
        auto offer = [&](int64_t from, float above, int64_t place, int64_t rank, bool main) {
            if (place == K || rank == T) return;
            const float sum = above + log[place * T + rank];
            open.push_back({sum == sum ? sum : -INFINITY, above, from, place, rank, main});
            std::push_heap(open.begin(), open.end(), after);
        };
        taken.clear();
        open.clear();
        for (offer(-1, 0, 0, 0, true); (int64_t)taken.size() < T;) {
            std::pop_heap(open.begin(), open.end(), after);
            const Node node = open.back();
            open.pop_back();
            taken.push_back(node);
            offer((int64_t)taken.size() - 1, node.sum, node.place + 1, 0, node.main);
            offer(node.from, node.above, node.place, node.rank + 1, false);
        }
        memset(visible, 0, R * R);
        ids[0] = last[b]; positions[0] = lengths[b]; parents[0] = -1; worth[0] = 0; visible[0] = 1;
        int64_t r = 1;
        for (int pass = 0; pass < 2; pass++)
            for (int64_t i = 0; i < T; i++) {
                const Node& node = taken[i];
                if (node.main != (pass == 0)) continue;
                const int64_t from = node.from < 0 ? 0 : row_of[node.from], of = token[node.place * T + node.rank];
                row_of[i] = r; ids[r] = target_ids ? target_ids[of] : of; worth[r] = node.sum;
                positions[r] = lengths[b] + node.place + 1; parents[r] = from;
                memcpy(visible + r * R, visible + from * R, R);
                visible[r * R + r] = 1;
                r++;
            }
    }
}
// The P of N rows of a tree at which a path is likeliest to end, in their order, and the tree with a block of M masks behind each
// (models/rows.py, `tree_and_blocks`). worth [B, N]: the log of the chance that a path reaches each row.
// Out: ends [B, P]; ids, positions, parents and masks [B, R] and visible [B, R, R], R = N + P M.
void zb_tree_and_blocks(const int64_t* tree_ids, const int64_t* tree_positions, const int64_t* tree_parents, const uint8_t* tree_visible,
                        const float* worth, int64_t B, int64_t N, int64_t P, int64_t M, int64_t mask, int64_t* ends,
                        int64_t* ids, int64_t* positions, int64_t* parents, int64_t* masks, uint8_t* visible) {
    const int64_t R = N + P * M;
    std::vector<float> chance(N);
    memset(visible, 0, B * R * R);
    for (int64_t b = 0; b < B; b++, ends += P, ids += R, positions += R, parents += R, masks += R, visible += R * R) {
        const int64_t at = b * N;
        for (int64_t r = 0; r < N; r++) chance[r] = expf(worth[at + r]);
        for (int64_t r = 1; r < N; r++)
            if (tree_parents[at + r] >= 0) chance[tree_parents[at + r]] -= expf(worth[at + r]);
        for (int64_t p = 0; p < P; p++) {
            int64_t best = -1;
            for (int64_t r = 0; r < N; r++)
                if (chance[r] == chance[r] && (best < 0 || chance[r] > chance[best])) best = r;
            if (best < 0) for (best = 0; std::find(ends, ends + p, best) != ends + p;) best++;  // only what is no number is left
            ends[p] = best;
            chance[best] = NAN;
        }
        std::sort(ends, ends + P);
        for (int64_t r = 0; r < N; r++) {
            ids[r] = tree_ids[at + r]; positions[r] = tree_positions[at + r]; parents[r] = tree_parents[at + r]; masks[r] = -1;
            memcpy(visible + r * R, tree_visible + (at + r) * N, N);
        }
        for (int64_t p = 0; p < P; p++)
            for (int64_t m = 0; m < M; m++) {
                const int64_t first = N + p * M, r = first + m;
                ids[r] = mask; positions[r] = positions[ends[p]] + 1 + m; parents[r] = m ? r - 1 : ends[p]; masks[r] = m;
                memcpy(visible + r * R, visible + ends[p] * R, N);
                memset(visible + r * R + first, 1, M);
            }
    }
}

// For accepted paths, rows kept [B, N] of which counts [B] are real, and rows `ends` [B, P] that blocks stand behind: which block
// is the last on the path (0 if none), and how many rows of the path come after it (`none` if none).
void zb_last_block(const int64_t* kept, const int64_t* counts, const int64_t* ends, int64_t B, int64_t N, int64_t P, int64_t none,
                   int64_t* block, int64_t* ahead) {
    for (int64_t b = 0; b < B; b++, kept += N, ends += P) {
        block[b] = 0;
        ahead[b] = none;
        for (int64_t i = counts[b] - 1; i >= 0 && ahead[b] == none; i--)
            if (const int64_t* end = std::find(ends, ends + P, kept[i]); end != ends + P) {
                block[b] = end - ends;
                ahead[b] = counts[b] - 1 - i;
            }
    }
}
}

// Returns 0, or the bytes that the workspace must have.
template <class W>
static int64_t draft(const zb_drafter& model, const zb_draft& batch) {
    const int D = (int)model.width, F = (int)model.ffn, H = (int)model.heads, G = (int)model.kv_heads, d = (int)model.head_dim;
    const int B = (int)batch.batch, QKV = (H + 2 * G) * d, T = (int)model.tap_width, fused = (int)model.taps * T;
    const int most = B * (int)batch.rows, chain = (int)batch.chain, threads = (int)batch.threads, V = (int)model.vocab;
    const int64_t S = batch.capacity;
    const float eps = (float)model.eps, scale = 1.0f / sqrtf((float)d);
    typedef act_t<W> A;

    Workspace space{(char*)batch.workspace, batch.workspace_bytes};
    float* embedded = space.take<float>((int64_t)most * D);
    float* joined = space.take<float>(batch.taps ? (int64_t)most * fused : 0);
    float* qkv = space.take<float>((int64_t)most * QKV);
    float* mixed = space.take<float>((int64_t)most * H * d);
    int widest = 2 * D > H * d ? 2 * D : H * d;
    if (batch.taps && fused > widest) widest = fused;
    A* act = space.take<A>((int64_t)(most + TALL) * widest);
    A* hidden = space.take<A>((int64_t)(most + TALL) * F);
    float* cosine = space.take<float>((int64_t)most * d / 2);
    float* sine = space.take<float>((int64_t)most * d / 2);
    float* scores = space.take<float>(threads * ((S + P - 1) / P) * TILE);
    A* queries = space.take<A>((int64_t)threads * LANES * d);
    const int64_t rows = batch.rows;
    uint8_t* causal = space.take<uint8_t>(2 * rows);  // ones, then zeros: what row r sees begins at rows - 1 - r
    float* logits = space.take<float>(chain ? (int64_t)B * V : 0);
    float* carried = space.take<float>(chain ? (int64_t)B * D : 0);
    int64_t* next = space.take<int64_t>(chain ? B : 0);
    float* chances = space.take<float>(chain ? B : 0);
    if (!space.ok) return space.needed;
    memset(causal, 1, rows);
    memset(causal + rows, 0, rows);
    for (int b = 0; b < B && chain; b++) chances[b] = !batch.active || batch.active[b] ? 1.0f : 0.0f;
    auto hopeful = [&] {
        for (int b = 0; b < B; b++)
            if (chances[b] >= (float)batch.confidence) return true;
        return false;
    };

    Barrier team;
#pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num(), n = omp_get_num_threads();
        int64_t* times = batch.times;
        auto mark = [&] { if (t == 0) stamp(times); };
        auto done = [&] { team.wait(n); mark(); };
        for (int level = 0; level == 0 || (level < chain && hopeful()); level++) {
            const bool first = level == 0, pairs = first && batch.taps;
            const int R = first ? (int)batch.rows : 1, M = B * R, before = first ? (int)batch.before : 0, tall = height(M);
            const int64_t* ids = first ? batch.ids : next;
            float* features = first ? batch.features : carried;
            const int m0 = (int)((int64_t)M * t / n), m1 = (int)((int64_t)M * (t + 1) / n);
            auto feature = [&](int m) { return features + (int64_t)m * D; };
            // What every row sees. The nodes of a chain are pairs to come: each sees all before it.
            auto prefix = [&](int b) { return batch.lengths[b] + (first ? 0 : batch.last[b] + level); };
            const Attention<W> attention{B, R, H, G, d, S, (W*)batch.keys, (W*)batch.values, qkv};

            mark();
            for (int m = m0; m < m1; m++) {
                const int b = m / R, r = m % R;
                const W* row = (const W*)model.embedding + ids[m] * D;
                for (int i = 0; i < D; i += VL) store(embedded + (int64_t)m * D + i, load_wide(row + i));
                const int64_t position = prefix(b) + (batch.visible && first ? before / R : r);
                turn(position, model.inv_freq, d / 2, cosine + (int64_t)m * (d / 2), sine + (int64_t)m * (d / 2));
                for (int i = 0; pairs && i < model.taps; i++) {
                    float* to = joined + (int64_t)m * fused + i * T;
                    memcpy(to, batch.taps[i] + (int64_t)m * T, T * 4);
                    if (model.tap_norms) normalise(to, model.tap_norms + i * T, eps, T);
                }
            }
            done();
            if (pairs) {
                const Acts<W> x{act, fused, tall};
                auto row = [&](int m) { return joined + (int64_t)m * fused; };
                if (model.joined_norm) normalise(row, model.joined_norm, eps, fused, x, M, t, n);
                else place(row, fused, x, M, t, n);
                team.wait(n);
                project<1>(Matrix<W>{(const W*)model.fc}, x, M, D, t, n, Assign{features, D, D, nullptr});
            }
            done();
            // The embedding's columns come first, the feature's behind them.
            normalise([&](int m) { return embedded + (int64_t)m * D; }, model.embedding_norm, eps, D, Acts<W>{act, 2 * D, tall}, M, t, n);
            normalise(feature, model.feature_norm, eps, D, Acts<W>{act + (int64_t)D * tall, 2 * D, tall}, M, t, n);
            done();
            project<1>(Matrix<W>{(const W*)model.qkv}, Acts<W>{act, 2 * D, tall}, M, QKV, t, n, Assign{qkv, QKV, QKV, nullptr});
            done();
            for (int m = m0; m < m1 && model.norm_before_residual; m++) normalise(feature(m), model.feature_norm, eps, D);
            attention.store(cosine, sine, nullptr, nullptr, eps, [&](int m) { return prefix(m / R) + before + m % R; }, t, n);
            done();
            const Acts<W> attended{act, H * d, tall}, normed{act, D, tall}, gated{hidden, F, tall};
            const bool nodes = first && batch.visible;
            const Seen sees = nodes ? Seen{batch.visible, (int64_t)R * (before + R), before + R} : Seen{causal + rows - 1, 0, -1};
            attention.attend(prefix, before + R, sees, nullptr, 0, scale, scores, queries, mixed, attended, t, n);
            done();
            project<1>(Matrix<W>{(const W*)model.out}, attended, M, D, t, n, Accumulate{features, D, nullptr});
            done();
            normalise(feature, model.mlp_norm, eps, D, normed, M, t, n);
            done();
            project<2>(Matrix<W>{(const W*)model.gate_up}, normed, M, 2 * F, t, n, Gate<W>{gated, nullptr});
            done();
            project<1>(Matrix<W>{(const W*)model.down}, gated, M, D, t, n, Accumulate{features, D, nullptr});
            done();
            if (model.norm_output) {
                for (int m = m0; m < m1; m++) normalise(feature(m), model.norm, eps, D);
                team.wait(n);
            }
            // Only the row that the chain goes on from passes the head.
            auto row = [&](int b) { return feature(first ? b * R + (int)batch.last[b] : b); };
            const Acts<W> asking{act, D, height(B)};
            if (chain && model.norm_output) place(row, D, asking, B, t, n);
            else if (chain) normalise(row, model.norm, eps, D, asking, B, t, n);
            done();
            if (chain) project<1>(Matrix<W>{(const W*)model.head}, asking, B, V, t, n, Assign{logits, V, V, nullptr});
            done();
            for (int b = B * t / n; b < B * (t + 1) / n && chain; b++) {
                float* of = logits + (int64_t)b * V;
                const int64_t out = ((int64_t)b * chain + level) * batch.top_k;
                float top = 0, share = 0;  // the largest logit and its chance
                for (int64_t k = 0; k < batch.top_k; k++) {
                    const int64_t best = first_largest(of, V);
                    if (k == 0) {
                        top = of[best];
                        if (batch.confidence > 0 || batch.scores) share = chance(of, top, V);
                    }
                    batch.tokens[out + k] = model.target_ids ? model.target_ids[best] : best;
                    if (batch.scores) batch.scores[out + k] = of[best] - top + logf(share * chances[b]);
                    of[best] = -INFINITY;
                }
                next[b] = batch.tokens[out];
                chances[b] *= share;
                if (first) memcpy(carried + (int64_t)b * D, row(b), D * 4);
            }
            if (t == 0) *batch.levels = level + 1;
            done();
        }
    }
    return 0;
}

extern "C" {
int64_t zb_draft_levels(const zb_drafter* model, const zb_draft* batch) {
    return model->bf16_weights ? draft<bf16>(*model, *batch) : draft<float>(*model, *batch);
}
}
