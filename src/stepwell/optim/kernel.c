/* One optimizer step of some blocks in one pass over memory: AdamW, LOTION's penalty in the first moment, and the rounded copy.

   The order of operations is that of torch's fused AdamW with fused multiply-adds where its vectors have them, so that without a penalty
   every bit agrees (compile with -ffp-contract=off: nothing else may be fused). The same loops are in kernel_numba.py; the numbers of a
   step are explained in numbers.py and have the order of `Numbers` there.

   A pass works through CHUNK elements at a time: short loops vectorize, and what they leave for each other stays in the first cache.
   Results do not depend on where a caller cuts the rows, as long as it cuts at multiples of CHUNK rows. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
#define FUSED(a, b, c) fmaf(a, b, c)
#else
#define FUSED(a, b, c) ((a) * (b) + (c))
#endif
#define INLINE static inline __attribute__((always_inline))

enum { CHUNK = 128, AHEAD = 2 * CHUNK };

typedef struct {
    float sign, decay, mix, blend, gain, keep, root, eps, rate;     /* AdamW */
    float pull, factor, spread, least, through;                     /* the penalty */
    float low, high, edge, border, tolerance, full;                 /* the grid */
} Numbers;

typedef struct {
    float *shown, *weight;
    const float *grad;
    float *first, *second;
    const float *scales;
} Arrays;

/* The largest magnitude, compared as bit patterns: exact, in vectors, and a NaN is the largest of all. */
INLINE float largest(const float *restrict weight, ptrdiff_t n) {
    uint32_t top = 0;
    #pragma omp simd reduction(max : top)
    for (ptrdiff_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, weight + i, sizeof bits);
        bits &= 0x7fffffffu;
        top = bits > top ? bits : top;
    }
    float found;
    memcpy(&found, &top, sizeof found);
    return found;
}

/* The weight of largest magnitude with its sign; of a tie the negative one. */
INLINE float peak(const float *restrict weight, ptrdiff_t n) {
    uint32_t above = 0, below = 0;
    #pragma omp simd reduction(max : above, below)
    for (ptrdiff_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, weight + i, sizeof bits);
        uint32_t size = bits & 0x7fffffffu, up = bits >> 31 ? 0 : size, down = bits >> 31 ? size : 0;
        above = up > above ? up : above;
        below = down > below ? down : below;
    }
    float high, low;
    memcpy(&high, &above, sizeof high);
    memcpy(&low, &below, sizeof low);
    return above > below ? high : -low;
}

INLINE float fitted(const float *weight, ptrdiff_t n, const Numbers *is) {
    return is->full ? peak(weight, n) / -is->edge : largest(weight, n) / is->edge;
}

/* The penalty's gradient at a fixed scale, the weights on the edge of the grid in units of the scale, and two sums over them. */
INLINE void penalty(const float *restrict weight, const float *restrict second, ptrdiff_t n, float scale, const Numbers *is,
                    float *restrict force, float *restrict mark, float *total, float *norm) {
    const float low = is->low, high = is->high, border = is->border, tolerance = is->tolerance, strength = scale * is->pull;
    const float lift = fabsf(scale) < 0x1p-126f ? 0x1p100f : 1; /* the reciprocal of a smaller scale overflows */
    const float inverse = scale == 0 ? 0 : 1 / (scale * lift);
    float sum = 0, square = 0;
    #pragma omp simd reduction(+ : sum, square)
    for (ptrdiff_t i = 0; i < n; i++) {
        float units = weight[i] * lift * inverse;
        units = units < low ? low : units;
        units = units > high ? high : units;
        float code = rintf(units), rest = units - code;
        rest = fabsf(rest) <= tolerance ? 0 : rest;
        float size = fabsf(rest), curvature = second[i] * strength;
        float slope = FUSED(-2.0f, rest, size > 0 ? copysignf(1, rest) : 0);
        float edge = fabsf(units) > border ? units : 0;
        sum += FUSED(-code, slope, size) * curvature;
        square += edge * edge;
        force[i] = slope * curvature;
        mark[i] = edge;
    }
    *total = sum;
    *norm = square;
}

/* What each unit on the edge of the grid gets of the derivative through the scale. */
INLINE float shared(double total, double norm, const Numbers *is) {
    return is->through * (float)(total / (norm < 0.5 ? 0.5 : norm));
}

INLINE void share(float *restrict force, const float *restrict mark, ptrdiff_t n, float part) {
    #pragma omp simd
    for (ptrdiff_t i = 0; i < n; i++) force[i] = FUSED(mark[i], part, force[i]);
}

INLINE int beyond(const float *restrict force, const float *restrict second, ptrdiff_t n, const Numbers *is) {
    const float spread = is->spread, least = is->least;
    int found = 0;
    #pragma omp simd reduction(| : found)
    for (ptrdiff_t i = 0; i < n; i++) {
        float over = fabsf(force[i]) - least;
        over = over < 0 ? 0 : over;
        found |= over * over >= second[i] * spread;
    }
    return found;
}

static __attribute__((noinline)) void bound(float *restrict force, const float *restrict second, ptrdiff_t n, const Numbers *is) {
    #pragma omp simd
    for (ptrdiff_t i = 0; i < n; i++) {
        float most = sqrtf(second[i] * is->spread) + is->least;
        force[i] = force[i] > most ? most : force[i] < -most ? -most : force[i];
    }
}

INLINE void adamw(const Arrays *at, const float *restrict force, ptrdiff_t n, const Numbers *is) {
    float *restrict weight = at->weight, *restrict first = at->first, *restrict second = at->second;
    const float *restrict grad = at->grad;
    const float sign = is->sign, decay = is->decay, mix = is->mix, gain = is->gain, keep = is->keep, root = is->root, eps = is->eps,
                rate = is->rate, factor = is->factor;
    const int blends = is->blend != 0;
    #pragma omp simd
    for (ptrdiff_t i = 0; i < n; i++) {
        float g = grad[i] * sign, m = first[i];
        if (force) m = FUSED(force[i], factor, m);
        m = FUSED(mix, g - m, blends ? g : m);
        float v = FUSED(gain * g, g, second[i] * keep);
        first[i] = m;
        second[i] = v;
        weight[i] = weight[i] * decay + rate * m / (sqrtf(v) / root + eps);
    }
}

INLINE void round_to_grid(float *restrict shown, const float *restrict weight, ptrdiff_t n, float scale, const Numbers *is) {
    const float low = is->low, high = is->high, divisor = scale == 0 ? INFINITY : scale;
    #pragma omp simd
    for (ptrdiff_t i = 0; i < n; i++) {
        float units = rintf(weight[i] / divisor);
        units = units < low ? low : units;
        units = units > high ? high : units;
        shown[i] = units * scale;
    }
}

/* Ask for the memory of a later chunk: a chunk's arrays are read one after the other, and each would be waited for. */
INLINE void prefetch(const Arrays *at) {
    for (ptrdiff_t i = AHEAD; i < AHEAD + CHUNK; i += 64 / (ptrdiff_t)sizeof(float)) {
        __builtin_prefetch(at->weight + i, 1);
        __builtin_prefetch(at->second + i, 1);
        __builtin_prefetch(at->grad + i, 0);
        __builtin_prefetch(at->first + i, 1);
        if (at->shown) __builtin_prefetch(at->shown + i, 1);
    }
}

INLINE Arrays offset(const Arrays *all, ptrdiff_t elements, ptrdiff_t rows) {
    return (Arrays){all->shown + (all->shown ? elements : 0), all->weight + elements, all->grad + elements, all->first + elements,
                    all->second + elements, all->scales + (all->scales ? rows : 0)};
}

/* Some whole blocks that fit a chunk. */
INLINE void together(const Arrays *at, ptrdiff_t blocks, ptrdiff_t block, const Numbers *is, int pushes, int deploys) {
    float force[CHUNK], mark[CHUNK], scale[CHUNK], part[CHUNK];
    if (pushes) {
        for (ptrdiff_t k = 0; k < blocks; k++) scale[k] = at->scales ? at->scales[k] : fitted(at->weight + k * block, block, is);
        for (ptrdiff_t k = 0; k < blocks; k++) {
            ptrdiff_t to = k * block;
            float total = 0, norm = 0;
            penalty(at->weight + to, at->second + to, block, scale[k], is, force + to, mark + to, &total, &norm);
            part[k] = shared(total, norm, is);
        }
        for (ptrdiff_t k = 0; k < blocks; k++) share(force + k * block, mark + k * block, block, part[k]);
        if (beyond(force, at->second, blocks * block, is)) bound(force, at->second, blocks * block, is);
    }
    adamw(at, pushes ? force : NULL, blocks * block, is);
    if (deploys) {
        for (ptrdiff_t k = 0; k < blocks; k++) scale[k] = at->scales ? at->scales[k] : fitted(at->weight + k * block, block, is);
        for (ptrdiff_t k = 0; k < blocks; k++) round_to_grid(at->shown + k * block, at->weight + k * block, block, scale[k], is);
    }
}

/* One block that is longer than a chunk. */
INLINE void piecewise(const Arrays *at, ptrdiff_t block, const Numbers *is, int pushes, int deploys) {
    float force[CHUNK], mark[CHUNK], scale = 0, part = 0;
    if (pushes) {
        double total = 0, norm = 0;
        scale = at->scales ? at->scales[0] : fitted(at->weight, block, is);
        for (ptrdiff_t to = 0; is->through && to < block; to += CHUNK) {
            ptrdiff_t n = block - to < CHUNK ? block - to : CHUNK;
            float one, two;
            penalty(at->weight + to, at->second + to, n, scale, is, force, mark, &one, &two);
            total += one;
            norm += two;
        }
        part = shared(total, norm, is);
    }
    for (ptrdiff_t to = 0; to < block; to += CHUNK) {
        ptrdiff_t n = block - to < CHUNK ? block - to : CHUNK;
        Arrays here = offset(at, to, 0);
        if (pushes) {
            float total, norm;
            penalty(here.weight, here.second, n, scale, is, force, mark, &total, &norm);
            share(force, mark, n, part);
            if (beyond(force, here.second, n, is)) bound(force, here.second, n, is);
        }
        adamw(&here, pushes ? force : NULL, n, is);
    }
    if (deploys) round_to_grid(at->shown, at->weight, block, at->scales ? at->scales[0] : fitted(at->weight, block, is), is);
}

/* `block` is a constant where it is one of the usual lengths, so that its loops are unrolled. */
INLINE void rows(const Arrays *all, ptrdiff_t start, ptrdiff_t stop, ptrdiff_t block, const Numbers *is, int pushes, int deploys) {
    ptrdiff_t most = block < CHUNK ? CHUNK / block : 1;
    for (ptrdiff_t row = start; row < stop; row += most) {
        Arrays at = offset(all, row * block, row);
        prefetch(&at);
        if (block > CHUNK)
            piecewise(&at, block, is, pushes, deploys);
        else if (stop - row >= most)
            together(&at, most, block, is, pushes, deploys);
        else
            together(&at, stop - row, block, is, pushes, deploys);
    }
}

INLINE void any_block(const Arrays *all, ptrdiff_t start, ptrdiff_t stop, ptrdiff_t block, const Numbers *is, int pushes, int deploys) {
    if (block == 32)
        rows(all, start, stop, 32, is, pushes, deploys);
    else
        rows(all, start, stop, block, is, pushes, deploys);
}

/* Step the blocks `start` to `stop`. Without `shown` nothing is rounded; with `scales`, one per block, none is fitted. */
void stepwell_adamw(float *shown, float *weight, const float *grad, float *first, float *second, const float *scales, int64_t start,
                    int64_t stop, int64_t block, const Numbers *is) {
    const Arrays all = {shown, weight, grad, first, second, scales};
    if (is->pull != 0 && shown)
        any_block(&all, start, stop, block, is, 1, 1);
    else if (is->pull != 0)
        any_block(&all, start, stop, block, is, 1, 0);
    else if (shown)
        any_block(&all, start, stop, block, is, 0, 1);
    else
        any_block(&all, start, stop, block, is, 0, 0);
}
