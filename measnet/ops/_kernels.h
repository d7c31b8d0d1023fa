/* The network's passes over fp32 BHWC features on a CPU. Included once for each vector width.
 *
 *   convolve, convolve_back       a depth-wise 3×3 convolution with zero padding, its offset, gelu; their gradients
 *   low_pass, low_pass_back       a depth-wise 3×3 convolution with a kernel per picture, reflecting at the edges, and what
 *                                 it leaves of x; their gradients
 *   expand                        layer norm or gelu or neither, then one to three 1×1 convolutions and their offsets
 *   project_back                  the gradients of all that but the norm
 *   gate, gate_back               x + W (gelu(dw a) · dw b), a and b expanded; the gradients of both
 *   correlate, correlate_back     from expanded q, k, v: dw v, and what attention does to it, the mixer: a matrix per picture
 *                                 from qᵀk of each head and the squares of q and k; the gradients of all that, and of the
 *                                 expansion where there is one
 *   mix, mix_back                 x + M v with the mixer M; its gradients
 *
 * Without expanded planes gate and correlate expand x themselves, and keep a few rows (inference).
 *
 * What a 1×1 convolution gives is used a few rows later, while it is in the cache: that is what is gained
 * over a library call per operation. Numbers of channels are multiples of LANES; hidden ones are padded.
 *
 * Work is cut into parts of rows of a picture, in the same way for any number of threads; sums over pixels (gradients of
 * weights, qᵀk) are given per part and added in the parts' order: results do not depend on threads. Threads are those of
 * the OpenMP runtime that torch has loaded; a second runtime would compete for the same cores.
 *
 * Legend: `count` pixels, `depth` channels that are summed over, `ld…` numbers from a pixel to the next. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

enum {
    TILE = LANES == 16 ? 8 : 4, /* pixels × PANEL vectors of channels are summed up in registers */
    PANEL = 3,
    BLOCK = 128, /* pixels that are expanded at once */
    BAND = 64,   /* least number of pixels that are worked on at once, where rows are short */
    TAPS = 9,
    STREAMS = 3,
    LARGE_PAGE = 2 << 20,
};

#define LEAST_SQUARES 1e-24f /* of a query's or key's least norm, transformer.EPSILON */

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Whole __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))

INLINE Lanes load(const float *from) {
    Lanes lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

INLINE void store(float *to, Lanes lanes) { memcpy(to, &lanes, sizeof lanes); }

INLINE float total(Lanes lanes) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}

INLINE Lanes choose(Whole mask, Lanes yes, Lanes no) { return (Lanes)((mask & (Whole)yes) | (~mask & (Whole)no)); }

/* --- Memory that a thread keeps for its next call --- */

typedef struct {
    float *at;
    size_t size, used;
} Arena;

static _Thread_local Arena scratch, packed_matrices;

/* 0 where there is no memory. */
static int reserve(Arena *arena, size_t size) {
    arena->used = 0;
    if (arena->size >= size) return 1;
    free(arena->at);
    arena->at = malloc(size * sizeof *arena->at);
    arena->size = arena->at ? size : 0;
    return arena->at != NULL;
}

static float *take(Arena *arena, size_t size) {
    float *at = arena->at + arena->used;
    arena->used += size;
    return at;
}

/* Ask for large pages where a result is about to be written: fetching 4 KiB at a time takes longer than computing it. */
static void expect(float *at, size_t size) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, from = ((uintptr_t)at + page - 1) / page * page;
    const uintptr_t to = ((uintptr_t)at + size * sizeof *at) / page * page;
    if (at && to > from + LARGE_PAGE) madvise((void *)from, to - from, MADV_HUGEPAGE); /* in vain is no error */
#else
    (void)at, (void)size;
#endif
}

/* --- Matrix products --- */

/* A depth × columns matrix, cut into panels of up to PANEL vectors of columns, each row by row. */
typedef struct {
    float *at;
    long depth, columns;
} Packed;

typedef struct {
    long first, width; /* in vectors */
} Panel;

static long panels_of(long columns) { return (columns / LANES + PANEL - 1) / PANEL; }

static Panel panel_of(long columns, long index) {
    const long vectors = columns / LANES, panels = panels_of(columns);
    const long least = vectors / panels, wider = vectors % panels;
    return (Panel){index * least + (index < wider ? index : wider), least + (index < wider)};
}

/* Where a matrix comes from: rows × columns, or turned; what is beyond `rows` and `columns` is 0. */
typedef struct {
    const float *from;
    long rows, columns, ld;
    int turned;
    Packed to;
} Pack;

static void pack_panel(const Pack *pack, long index) {
    const Panel panel = panel_of(pack->to.columns, index);
    const long width = panel.width * LANES, start = panel.first * LANES, depth = pack->to.depth;
    const long rows = pack->turned ? pack->columns : pack->rows, columns = pack->turned ? pack->rows : pack->columns;
    float *to = pack->to.at + start * depth;
    for (long top = 0; top < depth; top += LANES) {
        const long bottom = top + LANES < depth ? top + LANES : depth;
        for (long j = 0; j < width; j++)
            for (long k = top; k < bottom; k++) {
                const long row = pack->turned ? start + j : k, column = pack->turned ? k : start + j;
                const int inside = k < rows && start + j < columns;
                to[k * width + j] = inside ? pack->from[row * pack->ld + column] : 0;
            }
    }
}

INLINE void tile(int pixels, int width, const float *a, long lda, const float *b, long depth, float *out, long ldo,
                 int add) {
    Lanes sums[TILE + TILE / 2][PANEL];
#pragma GCC unroll 12
    for (int i = 0; i < pixels; i++)
#pragma GCC unroll 3
        for (int j = 0; j < width; j++) sums[i][j] = (Lanes){0};
    for (long k = 0; k < depth; k++, b += width * LANES) {
        Lanes row[PANEL];
#pragma GCC unroll 3
        for (int j = 0; j < width; j++) row[j] = load(b + j * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < pixels; i++) {
            const float value = a[i * lda + k];
#pragma GCC unroll 3
            for (int j = 0; j < width; j++) sums[i][j] += value * row[j];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < pixels; i++)
#pragma GCC unroll 3
        for (int j = 0; j < width; j++) { /* added last: small terms are not lost on a large one */
            float *to = out + i * ldo + j * LANES;
            store(to, add ? load(to) + sums[i][j] : sums[i][j]);
        }
}

/* As many pixels at once as keep the multipliers busy: fewer vectors of columns leave registers for more. */
INLINE void tiles(int width, const float *a, long lda, long count, const float *b, long depth, float *out, long ldo,
                  int add) {
    const int wide = width < PANEL ? TILE + TILE / 2 : TILE;
    long i = 0;
    for (; i + wide <= count; i += wide) tile(wide, width, a + i * lda, lda, b, depth, out + i * ldo, ldo, add);
    for (; i + TILE <= count; i += TILE) tile(TILE, width, a + i * lda, lda, b, depth, out + i * ldo, ldo, add);
    for (; i < count; i++) tile(1, width, a + i * lda, lda, b, depth, out + i * ldo, ldo, add);
}

/* out (count × columns) = a (count × depth) · b, or added to it. */
static void multiply(const float *a, long lda, long count, Packed b, float *out, long ldo, int add) {
    for (long index = 0; index < panels_of(b.columns); index++) {
        const Panel panel = panel_of(b.columns, index);
        const float *at = b.at + panel.first * LANES * b.depth;
        float *to = out + panel.first * LANES;
        if (panel.width == 3)
            tiles(3, a, lda, count, at, b.depth, to, ldo, add);
        else if (panel.width == 2)
            tiles(2, a, lda, count, at, b.depth, to, ldo, add);
        else
            tiles(1, a, lda, count, at, b.depth, to, ldo, add);
    }
}

INLINE void outer_tile(int width, const float *a, long lda, const float *b, long count, float *out, long ldo) {
    Lanes sums[TILE][PANEL];
#pragma GCC unroll 8
    for (int i = 0; i < TILE; i++)
#pragma GCC unroll 3
        for (int j = 0; j < width; j++) sums[i][j] = (Lanes){0};
    for (long p = 0; p < count; p++, a += lda, b += width * LANES) {
        Lanes row[PANEL];
#pragma GCC unroll 3
        for (int j = 0; j < width; j++) row[j] = load(b + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++)
#pragma GCC unroll 3
            for (int j = 0; j < width; j++) sums[i][j] += a[i] * row[j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < TILE; i++)
#pragma GCC unroll 3
        for (int j = 0; j < width; j++) {
            float *to = out + i * ldo + j * LANES;
            store(to, load(to) + sums[i][j]);
        }
}

/* out (rows × columns) += aᵀ b over `count` pixels. */
static void outer(const float *a, long lda, long rows, const float *b, long ldb, long columns, long count, float *out) {
    float panel_of_b[BAND * PANEL * LANES];
    for (; count > 0; count -= BAND, a += BAND * lda, b += BAND * ldb) {
        const long pixels = count < BAND ? count : BAND;
        for (long index = 0; index < panels_of(columns); index++) {
            const Panel panel = panel_of(columns, index);
            const long start = panel.first * LANES, width = panel.width * LANES;
            for (long p = 0; p < pixels; p++)
                memcpy(panel_of_b + p * width, b + p * ldb + start, (size_t)width * sizeof *b);
            for (long row = 0; row < rows; row += TILE) {
                float *to = out + row * columns + start;
                if (panel.width == 3)
                    outer_tile(3, a + row, lda, panel_of_b, pixels, to, columns);
                else if (panel.width == 2)
                    outer_tile(2, a + row, lda, panel_of_b, pixels, to, columns);
                else
                    outer_tile(1, a + row, lda, panel_of_b, pixels, to, columns);
            }
        }
    }
}

/* --- Layer norm --- */

typedef struct {
    const float *weight, *bias;
    float epsilon;
    long channels;
} Norm;

/* Mean and 1/√(variance + ε) of a pixel. */
INLINE void moments(const float *x, const Norm *norm, float *mean, float *scale) {
    Lanes sum = {0}, squares = {0};
    for (long c = 0; c < norm->channels; c += LANES) sum += load(x + c);
    *mean = total(sum) / (float)norm->channels;
    for (long c = 0; c < norm->channels; c += LANES) {
        const Lanes apart = load(x + c) - *mean;
        squares += apart * apart;
    }
    *scale = 1 / sqrtf(total(squares) / (float)norm->channels + norm->epsilon);
}

static void normalise(const float *x, long count, const Norm *norm, float *out) {
    for (const float *end = x + count * norm->channels; x < end; x += norm->channels, out += norm->channels) {
        float mean, scale;
        moments(x, norm, &mean, &scale);
        for (long c = 0; c < norm->channels; c += LANES)
            store(out + c, (load(x + c) - mean) * scale * load(norm->weight + c) + load(norm->bias + c));
    }
}

/* `gradient` of the normalised pixels -> `out` of x, plus `besides`; adds to the shares of weight and bias. */
static void normalise_back(const float *x, const float *gradient, const float *besides, long count, const Norm *norm,
                           float *out, float *of_weight, float *of_bias) {
    const long channels = norm->channels;
    for (long p = 0; p < count; p++, x += channels, gradient += channels, out += channels) {
        float mean, scale;
        moments(x, norm, &mean, &scale);
        Lanes sum = {0}, product = {0};
        for (long c = 0; c < channels; c += LANES) {
            const Lanes g = load(gradient + c), unit = (load(x + c) - mean) * scale;
            store(of_weight + c, load(of_weight + c) + g * unit);
            store(of_bias + c, load(of_bias + c) + g);
            const Lanes weighted = g * load(norm->weight + c);
            sum += weighted;
            product += weighted * unit;
        }
        const float common = total(sum) / (float)channels, along = total(product) / (float)channels;
        for (long c = 0; c < channels; c += LANES) {
            const Lanes unit = (load(x + c) - mean) * scale;
            Lanes value = (load(gradient + c) * load(norm->weight + c) - common - unit * along) * scale;
            if (besides) value += load(besides + p * channels + c);
            store(out + c, value);
        }
    }
}

/* --- Depth-wise convolutions, a row at a time --- */

/* Three rows of pixels around one; a row outside the picture is one of zeros. */
typedef struct {
    const float *at[3];
} Rows;

/* Each number is read once: a pixel's share of the pixel before it, of itself and of the next is added up in
 * registers. Turned by half a turn, the kernel (9, channels) gives the gradient of the input. */
static void convolve_row(Rows rows, const float *kernel, int turned, long width, long channels, float *out) {
    for (long c = 0; c < channels; c += LANES) {
        Lanes taps[TAPS];
#pragma GCC unroll 9
        for (int i = 0; i < TAPS; i++) taps[i] = load(kernel + (turned ? TAPS - 1 - i : i) * channels + c);
        Lanes before = {0}, here = {0};
        for (long x = 0; x < width; x++) {
            Lanes next = {0};
#pragma GCC unroll 3
            for (int i = 0; i < 3; i++) {
                const Lanes value = load(rows.at[i] + x * channels + c);
                before += taps[3 * i + 2] * value;
                here += taps[3 * i + 1] * value;
                next += taps[3 * i] * value;
            }
            if (x > 0) store(out + (x - 1) * channels + c, before);
            before = here, here = next;
        }
        store(out + (width - 1) * channels + c, before);
    }
}

/* Adds what a row gives to the kernel's gradient, (9, channels). */
static void kernel_row(Rows rows, const float *gradient, long width, long channels, float *of_kernel) {
    for (long c = 0; c < channels; c += LANES) {
        Lanes sums[TAPS];
#pragma GCC unroll 9
        for (int i = 0; i < TAPS; i++) sums[i] = (Lanes){0};
        Lanes before = {0}, here = load(gradient + c);
        for (long x = 0; x < width; x++) {
            const Lanes next = x + 1 < width ? load(gradient + (x + 1) * channels + c) : (Lanes){0};
#pragma GCC unroll 3
            for (int i = 0; i < 3; i++) {
                const Lanes value = load(rows.at[i] + x * channels + c);
                sums[3 * i] += value * next;
                sums[3 * i + 1] += value * here;
                sums[3 * i + 2] += value * before;
            }
            before = here, here = next;
        }
#pragma GCC unroll 9
        for (int i = 0; i < TAPS; i++) {
            float *to = of_kernel + i * channels + c;
            store(to, load(to) + sums[i]);
        }
    }
}

/* --- The gate --- */

/* e^x for x <= 0: 2^n times the series of e^f to the seventh degree, |f| <= ln(2)/2. */
INLINE Lanes exponential(Lanes x) {
    x = choose(x < -87.0f, x - x - 87.0f, x);
    const Whole n = __builtin_convertvector(x * 1.44269504f - 0.5f, Whole);
    const Lanes whole = __builtin_convertvector(n, Lanes);
    const Lanes f = x - whole * 0.693359375f + whole * 2.12194440e-4f; /* ln 2 in two parts */
    Lanes sum = f * (1.0f / 5040) + 1.0f / 720;
    sum = sum * f + 1.0f / 120;
    sum = sum * f + 1.0f / 24;
    sum = sum * f + 1.0f / 6;
    sum = sum * f + 0.5f;
    sum = sum * f + 1.0f;
    sum = sum * f + 1.0f;
    return sum * (Lanes)((n + 127) << 23);
}

/* Normal distribution at x and its density times x. Below 0 the distribution is e^(-x²/2) / 2 · erfcx(-x/√2), and erfcx(z) a
 * polynomial in t = 1 / (1 + 0.38 z) without a constant term, fitted for the least relative error: 2e-8 for z from 0 to 13. */
INLINE void normal(Lanes x, Lanes *distribution, Lanes *weighted_density) {
    static const float erfcx[] = {0.214412034f, 0.213902011f,  0.204024614f, 0.138207414f, 0.231026620f,
                                  -0.162862101f, 0.365052026f, -0.262842077f, 0.0590794781f};
    const Whole negative = x < 0.0f;
    const Lanes size = choose(negative, -x, x);
    const Lanes bell = exponential(size * size * -0.5f);
    const Lanes t = 1.0f / (1.0f + 0.268700577f * size);
    Lanes tail = t * erfcx[8] + erfcx[7];
#pragma GCC unroll 8
    for (int i = 6; i >= 0; i--) tail = tail * t + erfcx[i];
    tail = tail * t * bell * 0.5f;
    *distribution = choose(negative, tail, 1.0f - tail);
    *weighted_density = x * bell * 0.398942280f;
}

/* gelu(a) · b, in place of a. */
static void gate_row(float *a, const float *b, long numbers) {
    for (long i = 0; i < numbers; i += LANES) {
        Lanes distribution, density;
        const Lanes value = load(a + i);
        normal(value, &distribution, &density);
        store(a + i, value * distribution * load(b + i));
    }
}

/* From a, b and the gradient of gelu(a) · b: gradients in place of a and b, the product in place of the gradient. */
static void gate_row_back(float *a, float *b, float *gradient, long numbers) {
    for (long i = 0; i < numbers; i += LANES) {
        Lanes distribution, density;
        const Lanes value = load(a + i), other = load(b + i), g = load(gradient + i);
        normal(value, &distribution, &density);
        store(a + i, g * other * (distribution + density));
        store(b + i, g * value * distribution);
        store(gradient + i, value * distribution * other);
    }
}

/* gelu(x), which may be in place. */
static void gelu_row(const float *x, long numbers, float *out) {
    for (long i = 0; i < numbers; i += LANES) {
        Lanes distribution, density;
        const Lanes value = load(x + i);
        normal(value, &distribution, &density);
        store(out + i, value * distribution);
    }
}

/* The gradient of gelu(x), which may be in place of either. */
static void gelu_row_back(const float *x, const float *gradient, long numbers, float *out) {
    for (long i = 0; i < numbers; i += LANES) {
        Lanes distribution, density;
        normal(load(x + i), &distribution, &density);
        store(out + i, load(gradient + i) * (distribution + density));
    }
}

/* --- Offsets: one number per channel --- */

static void add_offset(const float *offset, long count, long channels, float *to) {
    for (const float *end = to + count * channels; offset && to < end; to += channels)
        for (long c = 0; c < channels; c += LANES) store(to + c, load(to + c) + load(offset + c));
}

static void add_up(const float *from, long count, long channels, float *sums) {
    for (long c = 0; c < channels; c += LANES) {
        Lanes sum = {0};
        for (long p = 0; p < count; p++) sum += load(from + p * channels + c);
        store(sums + c, load(sums + c) + sum);
    }
}

/* --- What is computed --- */

/* Addresses and sizes in the order in which the caller gives them. */
enum { X, WEIGHT, BIAS, MATRIX0, MATRIX1, MATRIX2, PLANE0, PLANE1, PLANE2, KERNEL0, KERNEL1, KERNEL2,
       OFFSET0, OFFSET1, OFFSET2, LAST, TEMPERATURE, PROJECT_OUT, GRADIENT, BESIDES, OF_MIXER, OUT, OUT1, OUT2, MIXER,
       GRAM, SQUARES, OF_NORM, OF_MATRIX, OF_KERNEL, OF_OFFSET, OF_LAST, OF_TEMPERATURE, OF_PROJECT_OUT, ADDRESSES };
enum { BATCH, HEIGHT, WIDTH, CHANNELS, HIDDEN, PADDED, HEADS, PART, ACTIVATED, COUNT_OF_STREAMS, SIZES };

/* One of the convolved planes: a and b of the gate, or q, k and v. */
typedef struct {
    const float *plane, *kernel;
    float *ring; /* the last rows of the gradient of what it is convolved to */
    long rows;   /* of the ring */
    Packed matrix;
} Stream;

/* A sum over the tasks, or over those of each picture: `planes` matrices, whose shares may be padded. */
typedef struct {
    int address, per_picture;
    int turned; /* the sum lies column by column */
    long planes, rows, columns, padded_rows, padded_columns;
    float *shares; /* one after the other */
} Sum;

typedef struct {
    float *at[ADDRESSES];
    long size[SIZES];
    float epsilon;
    Norm norm;
    long parts, planes, width; /* parts of a picture; streams; channels of a plane */
    int packs, sums;
    Pack pack[2 * STREAMS + 1];
    Sum sum[ADDRESSES];
    const float *taps[STREAMS]; /* (9, width) each; low_pass: one for each picture */
    Packed *head;               /* correlate_back: two for each head of each picture; mix: one for each picture */
    long heads;
    float *of_gram, *of_squares; /* correlate_back */
} Job;

typedef struct {
    long picture, top, bottom, index;
} Task;

INLINE long size_of_share(const Sum *sum) { return sum->planes * sum->padded_rows * sum->padded_columns; }

/* A task's own share of a sum; NULL where it is not asked for. */
static float *share_of(const Job *job, const Task *task, int address) {
    for (const Sum *sum = job->sum; sum < job->sum + job->sums; sum++)
        if (sum->address == address) return sum->shares + task->index * size_of_share(sum);
    return NULL;
}

INLINE long row_size(const Job *job, long channels) { return job->size[WIDTH] * channels; }

INLINE float *pixel(const Job *job, int address, long channels, long picture, long y) {
    return job->at[address] + (picture * job->size[HEIGHT] + y) * row_size(job, channels);
}

/* Rows that are worked on at once. */
static long band_of(const Job *job) {
    const long rows = (BAND + job->size[WIDTH] - 1) / job->size[WIDTH];
    return rows < job->size[PART] ? rows : job->size[PART];
}

/* Three rows around y of a picture's plane, or of a ring of its last rows. */
INLINE Rows rows_around(const Job *job, const float *plane, long rows, long y, long channels, const float *zeros) {
    Rows found;
    for (int i = 0; i < 3; i++) {
        const long there = y + i - 1;
        const int inside = there >= 0 && there < job->size[HEIGHT];
        found.at[i] = inside ? plane + there % rows * row_size(job, channels) : zeros;
    }
    return found;
}

INLINE float *plane_of(const Job *job, int address, long picture) {
    return pixel(job, address, job->width, picture, 0);
}

static float *zeros_of(const Job *job) {
    float *zeros = take(&scratch, row_size(job, job->width));
    memset(zeros, 0, (size_t)row_size(job, job->width) * sizeof *zeros);
    return zeros;
}

/* Rows y0 … y1-1 of a plane's gradient, and its kernel's share, from the ring of what it is convolved to. */
static void plane_back(const Job *job, const Task *task, const Stream *streams, long s, long y0, long y1, const float *zeros,
                       float *of_plane) {
    const long width = job->size[WIDTH], hidden = job->width;
    float *of_kernel = share_of(job, task, OF_KERNEL) + s * TAPS * hidden;
    for (long y = y0; y < y1; y++) {
        const Rows ring = rows_around(job, streams[s].ring, streams[s].rows, y, hidden, zeros);
        convolve_row(ring, streams[s].kernel, 1, width, hidden, of_plane + (y - y0) * width * hidden);
        kernel_row(rows_around(job, streams[s].plane, job->size[HEIGHT], y, hidden, zeros), ring.at[1], width, hidden,
                   of_kernel);
    }
}

/* What a plane's part of the backward pass shares: rows y0 … y1-1 of the gradients of the planes, and all before. */
static void expand_back(const Job *job, const Task *task, const Stream *streams, long y0, long y1, const float *besides,
                        const float *zeros, float *of_plane, float *normalised, float *of_normalised) {
    const long channels = job->size[CHANNELS], width = job->size[WIDTH], hidden = job->width, height = job->size[HEIGHT];
    const long count = (y1 - y0) * width, first = task->picture * height + y0;
    const float *x = job->at[X] + first * width * channels;
    float *of_matrix = share_of(job, task, OF_MATRIX), *of_norm = share_of(job, task, OF_NORM);
    normalise(x, count, &job->norm, normalised);
    for (long s = 0; s < job->planes; s++) {
        plane_back(job, task, streams, s, y0, y1, zeros, of_plane);
        outer(of_plane, hidden, hidden, normalised, channels, channels, count, of_matrix + s * hidden * channels);
        multiply(of_plane, hidden, count, streams[s].matrix, of_normalised, channels, s > 0);
    }
    normalise_back(x, of_normalised, besides, count, &job->norm, job->at[OUT] + first * width * channels, of_norm,
                   of_norm + channels);
}

/* Row y of a plane convolved, plus the offset. */
INLINE void convolve_plane(const Job *job, const float *plane, long y, const float *zeros, float *out) {
    convolve_row(rows_around(job, plane, job->size[HEIGHT], y, job->width, zeros), job->taps[0], 0, job->size[WIDTH],
                 job->width, out);
    add_offset(job->at[OFFSET0], job->size[WIDTH], job->width, out);
}

static void convolve(const Job *job, const Task *task) {
    const float *zeros = zeros_of(job), *plane = plane_of(job, PLANE0, task->picture);
    for (long y = task->top; y < task->bottom; y++) {
        float *out = pixel(job, OUT, job->width, task->picture, y);
        convolve_plane(job, plane, y, zeros, out);
        if (job->size[ACTIVATED]) gelu_row(out, row_size(job, job->width), out);
    }
}

static void convolve_back(const Job *job, const Task *task) {
    const int activated = job->size[ACTIVATED] != 0;
    const float *zeros = zeros_of(job), *plane = plane_of(job, PLANE0, task->picture);
    const float *gradient = plane_of(job, GRADIENT, task->picture);
    const long height = job->size[HEIGHT], width = job->size[WIDTH], row = row_size(job, job->width);
    const long rows = activated ? 3 : height;
    float *ring = activated ? take(&scratch, 3 * row) : NULL;
    const float *of_convolved = activated ? ring : gradient;
    float *of_kernel = share_of(job, task, OF_KERNEL), *of_offset = share_of(job, task, OF_OFFSET);
    long next = task->top > 0 ? task->top - 1 : 0;
    for (long y = task->top; y < task->bottom; y++) {
        for (; activated && next < height && next <= y + 1; next++) {
            float *here = ring + next % 3 * row;
            convolve_plane(job, plane, next, zeros, here);
            gelu_row_back(here, gradient + next * row, row, here);
        }
        const Rows around = rows_around(job, of_convolved, rows, y, job->width, zeros);
        convolve_row(around, job->taps[0], 1, width, job->width, pixel(job, OUT, job->width, task->picture, y));
        kernel_row(rows_around(job, plane, height, y, job->width, zeros), around.at[1], width, job->width, of_kernel);
        if (of_offset) add_up(around.at[1], width, job->width, of_offset);
    }
}

/* --- A low-pass of each picture's own, which reflects at the edges --- */

static long reflected(long at, long size) { return at < 0 ? -at : at < size ? at : 2 * size - 2 - at; }

static Rows rows_reflected(const Job *job, const float *plane, long y) {
    const long height = job->size[HEIGHT], row = row_size(job, job->width);
    return (Rows){{plane + reflected(y - 1, height) * row, plane + y * row, plane + reflected(y + 1, height) * row}};
}

static const float *own_kernel(const Job *job, const Task *task) {
    return job->taps[0] + task->picture * TAPS * job->width;
}

/* to += taps i of three rows' pixels. */
static void add_taps(Rows rows, long at, const float *kernel, const int i[3], long channels, float *to) {
    for (long c = 0; c < channels; c += LANES) {
        Lanes sum = load(to + c);
        for (int r = 0; r < 3; r++) sum += load(kernel + i[r] * channels + c) * load(rows.at[r] + at * channels + c);
        store(to + c, sum);
    }
}

static void low_pass(const Job *job, const Task *task) {
    static const int left[3] = {0, 3, 6}, right[3] = {2, 5, 8};
    const long width = job->size[WIDTH], channels = job->width;
    const float *kernel = own_kernel(job, task), *plane = plane_of(job, X, task->picture);
    for (long y = task->top; y < task->bottom; y++) {
        const Rows rows = rows_reflected(job, plane, y);
        float *low = pixel(job, OUT, channels, task->picture, y), *high = pixel(job, OUT1, channels, task->picture, y);
        convolve_row(rows, kernel, 0, width, channels, low);
        add_taps(rows, 1, kernel, left, channels, low);
        add_taps(rows, width - 2, kernel, right, channels, low + (width - 1) * channels);
        for (long i = 0; i < width * channels; i += LANES) store(high + i, load(rows.at[1] + i) - load(low + i));
    }
}

/* A row of the padded picture's gradient; what falls on its columns beyond the edges is that of the columns they show. */
static void reflected_row_back(Rows rows, const float *kernel, long width, long channels, float *out) {
    static const int left[3] = {6, 3, 0}, right[3] = {8, 5, 2};
    convolve_row(rows, kernel, 1, width, channels, out);
    add_taps(rows, 0, kernel, left, channels, out + channels);
    add_taps(rows, width - 1, kernel, right, channels, out + (width - 2) * channels);
}

/* Adds what the columns beyond the edges give to the kernel's gradient. */
static void kernel_edges(Rows rows, const float *gradient, long width, long channels, float *of_kernel) {
    const long last = (width - 1) * channels;
    for (int r = 0; r < 3; r++)
        for (long c = 0; c < channels; c += LANES) {
            float *left = of_kernel + 3 * r * channels + c, *right = left + 2 * channels;
            store(left, load(left) + load(rows.at[r] + channels + c) * load(gradient + c));
            store(right, load(right) + load(rows.at[r] + last - channels + c) * load(gradient + last + c));
        }
}

static void low_pass_back(const Job *job, const Task *task) {
    const long height = job->size[HEIGHT], width = job->size[WIDTH], channels = job->width, row = row_size(job, channels);
    const float *zeros = zeros_of(job), *kernel = own_kernel(job, task), *plane = plane_of(job, X, task->picture);
    const float *of_low = plane_of(job, GRADIENT, task->picture), *of_high = plane_of(job, PLANE0, task->picture);
    float *ring = take(&scratch, 3 * row), *beyond = take(&scratch, row);
    float *of_kernel = share_of(job, task, OF_KERNEL);
    long next = task->top > 0 ? task->top - 1 : 0;
    for (long y = task->top; y < task->bottom; y++) {
        for (; next < height && next <= y + 1; next++)
            for (long i = 0; i < row; i += LANES)
                store(ring + next % 3 * row + i, load(of_low + next * row + i) - load(of_high + next * row + i));
        const Rows around = rows_around(job, ring, 3, y, channels, zeros);
        float *out = pixel(job, OUT, channels, task->picture, y);
        reflected_row_back(around, kernel, width, channels, out);
        if (y == 1) { /* it stands above the first row, too */
            reflected_row_back((Rows){{zeros, zeros, ring}}, kernel, width, channels, beyond);
            add_up(beyond, 1, row, out);
        }
        if (y == height - 2) { /* and this one below the last */
            reflected_row_back((Rows){{ring + (height - 1) % 3 * row, zeros, zeros}}, kernel, width, channels, beyond);
            add_up(beyond, 1, row, out);
        }
        add_up(of_high + y * row, 1, row, out);
        const Rows rows = rows_reflected(job, plane, y);
        kernel_row(rows, around.at[1], width, channels, of_kernel);
        kernel_edges(rows, around.at[1], width, channels, of_kernel);
    }
}

/* What is projected: the normalised input where there is a norm, else the input or gelu of it; in `room` if it is computed. */
static const float *prepare(const Job *job, const float *x, long count, float *room) {
    if (job->at[WEIGHT])
        normalise(x, count, &job->norm, room);
    else if (job->size[ACTIVATED])
        gelu_row(x, count * job->size[CHANNELS], room);
    else
        return x;
    return room;
}

static void expand(const Job *job, const Task *task) {
    const long channels = job->size[CHANNELS], width = job->size[WIDTH];
    const long first = (task->picture * job->size[HEIGHT] + task->top) * width;
    const long last = first + (task->bottom - task->top) * width;
    float *room = take(&scratch, BLOCK * channels);
    for (long p = first; p < last; p += BLOCK) {
        const long count = p + BLOCK < last ? BLOCK : last - p;
        const float *from = prepare(job, job->at[X] + p * channels, count, room);
        for (long s = 0; s < job->planes; s++) {
            float *out = job->at[PLANE0 + s] + p * job->width;
            multiply(from, channels, count, job->pack[s].to, out, job->width, 0);
            add_offset(job->at[OFFSET0 + s], count, job->width, out);
        }
    }
}

/* From the gradients of the planes; not through a norm. */
static void project_back(const Job *job, const Task *task) {
    const long channels = job->size[CHANNELS], width = job->size[WIDTH], columns = job->width;
    const long first = (task->picture * job->size[HEIGHT] + task->top) * width;
    const long last = first + (task->bottom - task->top) * width;
    float *room = take(&scratch, BLOCK * channels);
    float *of_matrix = share_of(job, task, OF_MATRIX), *of_offset = share_of(job, task, OF_OFFSET);
    for (long p = first; p < last; p += BLOCK) {
        const long count = p + BLOCK < last ? BLOCK : last - p;
        const float *x = job->at[X] + p * channels, *from = prepare(job, x, count, room);
        float *out = job->at[OUT] + p * channels;
        for (long s = 0; s < job->planes; s++) {
            const float *gradient = job->at[PLANE0 + s] + p * columns;
            multiply(gradient, columns, count, job->pack[s].to, out, channels, s > 0);
            outer(gradient, columns, columns, from, channels, channels, count, of_matrix + s * columns * channels);
            if (of_offset) add_up(gradient, count, columns, of_offset + s * columns);
        }
        if (job->size[ACTIVATED]) gelu_row_back(x, out, count * channels, out);
    }
}

/* Rows y0 … y1-1 of x + W (gated). */
static void contract(const Job *job, const Task *task, long y0, long y1, const float *gated, Packed matrix) {
    const long channels = job->size[CHANNELS];
    const size_t numbers = (size_t)((y1 - y0) * row_size(job, channels));
    float *out = pixel(job, OUT, channels, task->picture, y0);
    memcpy(out, pixel(job, X, channels, task->picture, y0), numbers * sizeof *out);
    multiply(gated, job->width, (y1 - y0) * job->size[WIDTH], matrix, out, channels, 1);
}

/* What one to three 1×1 convolutions of the normalised input give: the last rows of it, or all. */
typedef struct {
    float *plane[STREAMS], *normalised;
    long rows, next; /* the first row that is not there yet */
} Ring;

static Ring ring_of(const Job *job, const Task *task) {
    Ring ring = {.rows = band_of(job) + 2, .next = task->top > 0 ? task->top - 1 : 0};
    for (long s = 0; s < job->planes; s++) ring.plane[s] = take(&scratch, ring.rows * row_size(job, job->width));
    ring.normalised = take(&scratch, ring.rows * row_size(job, job->size[CHANNELS]));
    return ring;
}

/* All rows that a convolution of the rows up to y1-1 needs. */
static void expand_to(const Job *job, const Task *task, Ring *ring, long y1) {
    const long channels = job->size[CHANNELS], to = y1 + 1 < job->size[HEIGHT] ? y1 + 1 : job->size[HEIGHT];
    while (ring->next < to) {
        const long at = ring->next % ring->rows, room = ring->rows - at;
        const long rows = to - ring->next < room ? to - ring->next : room, count = rows * job->size[WIDTH];
        normalise(pixel(job, X, channels, task->picture, ring->next), count, &job->norm, ring->normalised);
        for (long s = 0; s < job->planes; s++)
            multiply(ring->normalised, channels, count, job->pack[s].to, ring->plane[s] + at * row_size(job, job->width),
                     job->width, 0);
        ring->next += rows;
    }
}

/* From planes that are kept, or, without them, from x. */
static void gate(const Job *job, const Task *task) {
    const int straight = job->at[PLANE0] == NULL;
    const long band = band_of(job), width = job->size[WIDTH], row = row_size(job, job->width);
    const float *zeros = zeros_of(job);
    Ring ring = {.rows = job->size[HEIGHT]};
    if (straight)
        ring = ring_of(job, task);
    else
        for (int s = 0; s < 2; s++) ring.plane[s] = plane_of(job, PLANE0 + s, task->picture);
    float *of_a = take(&scratch, band * row), *of_b = take(&scratch, row);
    for (long y0 = task->top; y0 < task->bottom; y0 += band) {
        const long y1 = y0 + band < task->bottom ? y0 + band : task->bottom;
        if (straight) expand_to(job, task, &ring, y1);
        for (long y = y0; y < y1; y++) {
            float *here = of_a + (y - y0) * row;
            convolve_row(rows_around(job, ring.plane[0], ring.rows, y, job->width, zeros), job->taps[0], 0, width,
                         job->width, here);
            convolve_row(rows_around(job, ring.plane[1], ring.rows, y, job->width, zeros), job->taps[1], 0, width,
                         job->width, of_b);
            gate_row(here, of_b, row);
        }
        contract(job, task, y0, y1, of_a, job->pack[job->packs - 1].to);
    }
}

static void gate_back(const Job *job, const Task *task) {
    const long band = band_of(job), ring = band + 2, row = row_size(job, job->width);
    const long channels = job->size[CHANNELS], width = job->size[WIDTH], height = job->size[HEIGHT];
    const float *zeros = zeros_of(job);
    float *gated = take(&scratch, ring * row), *of_plane = take(&scratch, band * row);
    float *normalised = take(&scratch, band * width * channels), *of_normalised = take(&scratch, band * width * channels);
    Stream streams[STREAMS];
    for (int s = 0; s < 2; s++)
        streams[s] = (Stream){plane_of(job, PLANE0 + s, task->picture), job->taps[s],
                              take(&scratch, ring * row), ring, job->pack[s].to};
    long next = task->top > 0 ? task->top - 1 : 0; /* a convolution's gradient needs one more row on either side */
    for (long y0 = task->top; y0 < task->bottom; y0 += band) {
        const long y1 = y0 + band < task->bottom ? y0 + band : task->bottom;
        const long from = next, to = y1 + 1 < height ? y1 + 1 : height;
        const float *gradient = pixel(job, GRADIENT, channels, task->picture, 0);
        multiply(gradient + from * width * channels, channels, (to - from) * width, job->pack[2].to, gated, job->width, 0);
        for (long y = from; y < to; y++) {
            float *a = streams[0].ring + y % ring * row, *b = streams[1].ring + y % ring * row;
            convolve_row(rows_around(job, streams[0].plane, height, y, job->width, zeros), streams[0].kernel, 0, width,
                         job->width, a);
            convolve_row(rows_around(job, streams[1].plane, height, y, job->width, zeros), streams[1].kernel, 0, width,
                         job->width, b);
            gate_row_back(a, b, gated + (y - from) * row, row);
        }
        next = to;
        const long own = from > task->top ? from : task->top, end = to < task->bottom ? to : task->bottom;
        if (end > own)
            outer(gradient + own * width * channels, channels, channels, gated + (own - from) * row, job->width, job->width,
                  (end - own) * width, share_of(job, task, OF_LAST));
        expand_back(job, task, streams, y0, y1, gradient + y0 * width * channels, zeros, of_plane, normalised,
                    of_normalised);
    }
}

/* Adds what `count` pixels of q and k give to the sums of a part. */
static void correlate_pixels(const Job *job, const Task *task, float *const both[2], long count) {
    const long channels = job->size[CHANNELS], heads = job->size[HEADS], each = channels / heads;
    float *gram = share_of(job, task, GRAM);
    for (long h = 0; h < heads; h++)
        outer(both[0] + h * each, channels, each, both[1] + h * each, channels, each, count, gram + h * each * each);
    for (int s = 0; s < 2; s++) {
        float *squares = share_of(job, task, SQUARES) + s * channels;
        for (long c = 0; c < channels; c += LANES) {
            Lanes sum = {0};
            for (long p = 0; p < count; p++) {
                const Lanes value = load(both[s] + p * channels + c);
                sum += value * value;
            }
            store(squares + c, load(squares + c) + sum);
        }
    }
}

/* From planes that are kept, or, without them, from x. */
static void correlate(const Job *job, const Task *task) {
    const int straight = job->at[PLANE0] == NULL;
    const long band = band_of(job), channels = job->size[CHANNELS], width = job->size[WIDTH];
    const long row = row_size(job, channels);
    const float *zeros = zeros_of(job);
    float *both[2] = {take(&scratch, band * row), take(&scratch, band * row)};
    Ring ring = {.rows = job->size[HEIGHT]};
    if (straight)
        ring = ring_of(job, task);
    else
        for (int s = 0; s < 3; s++) ring.plane[s] = plane_of(job, PLANE0 + s, task->picture);
    for (long y0 = task->top; y0 < task->bottom; y0 += band) {
        const long y1 = y0 + band < task->bottom ? y0 + band : task->bottom;
        if (straight) expand_to(job, task, &ring, y1);
        for (long y = y0; y < y1; y++)
            for (int s = 0; s < 3; s++) {
                float *to = s < 2 ? both[s] + (y - y0) * row : pixel(job, OUT, channels, task->picture, y);
                convolve_row(rows_around(job, ring.plane[s], ring.rows, y, channels, zeros), job->taps[s], 0, width,
                             channels, to);
            }
        correlate_pixels(job, task, both, (y1 - y0) * width);
    }
}

/* To the planes, or, where there are matrices, on through expansion and norm. */
static void correlate_back(const Job *job, const Task *task) {
    const int through = job->at[MATRIX0] != NULL;
    const long band = band_of(job), ring = band + 2, channels = job->size[CHANNELS], width = job->size[WIDTH];
    const long height = job->size[HEIGHT], heads = job->size[HEADS], row = row_size(job, channels), each = channels / heads;
    const float *zeros = zeros_of(job);
    float *both[2] = {take(&scratch, row), take(&scratch, row)};
    float *of_plane = take(&scratch, band * row);
    float *normalised = take(&scratch, band * row), *of_normalised = take(&scratch, band * row);
    Stream streams[STREAMS];
    for (int s = 0; s < 3; s++)
        streams[s] = (Stream){plane_of(job, PLANE0 + s, task->picture), job->taps[s],
                              s < 2 ? take(&scratch, ring * row) : pixel(job, GRADIENT, channels, task->picture, 0),
                              s < 2 ? ring : height, job->pack[s].to};
    long next = task->top > 0 ? task->top - 1 : 0;
    for (long y0 = task->top; y0 < task->bottom; y0 += band) {
        const long y1 = y0 + band < task->bottom ? y0 + band : task->bottom;
        const long to = y1 + 1 < height ? y1 + 1 : height;
        for (long y = next; y < to; y++) {
            for (int s = 0; s < 2; s++)
                convolve_row(rows_around(job, streams[s].plane, height, y, channels, zeros), streams[s].kernel, 0, width,
                             channels, both[s]);
            for (int s = 0; s < 2; s++) { /* 2 q d(squares of q) + k d(gram)ᵀ, and the other way round */
                float *here = streams[s].ring + y % ring * row;
                const float *of_squares = job->of_squares + (task->picture * 2 + s) * channels;
                for (long p = 0; p < width; p++)
                    for (long c = 0; c < channels; c += LANES)
                        store(here + p * channels + c, 2 * load(both[s] + p * channels + c) * load(of_squares + c));
                for (long h = 0; h < heads; h++)
                    multiply(both[1 - s] + h * each, channels, width, job->head[(task->picture * heads + h) * 2 + s],
                             here + h * each, channels, 1);
            }
        }
        next = to;
        const float *besides = job->at[BESIDES] ? pixel(job, BESIDES, channels, task->picture, y0) : NULL;
        if (through) expand_back(job, task, streams, y0, y1, besides, zeros, of_plane, normalised, of_normalised);
        for (long s = 0; !through && s < 3; s++)
            plane_back(job, task, streams, s, y0, y1, zeros, pixel(job, OUT + s, channels, task->picture, y0));
    }
}

/* --- What attention does to v, from the sums over q and k --- */

/* Where a head begins in a picture's q · kᵀ, and in its mixer or its projection. */
INLINE long gram_at(const Job *job, long picture, long head) {
    const long channels = job->size[CHANNELS], each = channels / job->size[HEADS];
    return (picture * channels + head * each) * each;
}

INLINE long mixer_at(const Job *job, long picture, long head) {
    const long channels = job->size[CHANNELS];
    return picture * channels * channels + head * (channels / job->size[HEADS]);
}

/* A head's cosines of q and k, and softmax(temperature · cosine), each × each; in `norms` those of q and of k. */
static void attend(const Job *job, long picture, long head, float *norms, float *cosines, float *attention) {
    const long channels = job->size[CHANNELS], each = channels / job->size[HEADS];
    const float *gram = job->at[GRAM] + gram_at(job, picture, head), temperature = job->at[TEMPERATURE][head];
    for (long s = 0; s < 2; s++)
        for (long i = 0; i < each; i++) {
            const float squares = job->at[SQUARES][(picture * 2 + s) * channels + head * each + i];
            norms[s * each + i] = sqrtf(squares < LEAST_SQUARES ? LEAST_SQUARES : squares);
        }
    for (long i = 0; i < each; i++, gram += each, cosines += each, attention += each) {
        float most = -INFINITY;
        for (long j = 0; j < each; j++) {
            cosines[j] = gram[j] / norms[i] / norms[each + j];
            most = cosines[j] * temperature > most ? cosines[j] * temperature : most;
        }
        Lanes sum = {0};
        for (long j = 0; j < each; j += LANES) {
            const Lanes power = exponential(load(cosines + j) * temperature - most);
            store(attention + j, power);
            sum += power;
        }
        const float scale = 1 / total(sum);
        for (long j = 0; j < each; j += LANES) store(attention + j, load(attention + j) * scale);
    }
}

/* Room that the following two take. */
static long attention_size(const Job *job) {
    const long each = job->size[CHANNELS] / job->size[HEADS];
    return 4 * each * each + 2 * each;
}

static Packed packed(const float *from, long size, int turned, float *to) {
    const Pack pack = {from, size, size, size, turned, {to, size, size}};
    for (long panel = 0; panel < panels_of(size); panel++) pack_panel(&pack, panel);
    return pack.to;
}

/* A head's columns of the mixer: projection · attention. */
static void mixer_of(const Job *job, long picture, long head) {
    const long channels = job->size[CHANNELS], each = channels / job->size[HEADS];
    float *norms = take(&scratch, 2 * each), *cosines = take(&scratch, each * each);
    float *attention = take(&scratch, each * each), *room = take(&scratch, each * each);
    attend(job, picture, head, norms, cosines, attention);
    multiply(job->at[PROJECT_OUT] + mixer_at(job, 0, head), channels, channels, packed(attention, each, 0, room),
             job->at[MIXER] + mixer_at(job, picture, head), channels, 0);
}

/* From the mixer's gradient: of a head's q · kᵀ and squares; adds to those of projection and temperature. */
static void mixer_back(const Job *job, long picture, long head) {
    const long channels = job->size[CHANNELS], each = channels / job->size[HEADS];
    const float *of_mixer = job->at[OF_MIXER] + mixer_at(job, picture, head), temperature = job->at[TEMPERATURE][head];
    const float *project_out = job->at[PROJECT_OUT] + mixer_at(job, 0, head);
    float *norms = take(&scratch, 2 * each), *cosines = take(&scratch, each * each);
    float *attention = take(&scratch, each * each), *of_attention = take(&scratch, each * each);
    attend(job, picture, head, norms, cosines, attention);
    multiply(of_mixer, channels, channels, packed(attention, each, 1, take(&scratch, each * each)),
             job->at[OF_PROJECT_OUT] + mixer_at(job, 0, head), channels, picture > 0);
    memset(of_attention, 0, (size_t)(each * each) * sizeof *of_attention);
    outer(project_out, channels, each, of_mixer, channels, each, channels, of_attention);
    float *of_gram = job->of_gram + gram_at(job, picture, head), sum = 0;
    float *of_squares = job->of_squares + picture * 2 * channels + head * each;
    memset(of_squares + channels, 0, (size_t)each * sizeof *of_squares);
    for (long i = 0; i < each; i++) {
        const float *a = attention + i * each, *of_a = of_attention + i * each, *cosine = cosines + i * each;
        Lanes products = {0}, along = {0};
        for (long j = 0; j < each; j += LANES) products += load(a + j) * load(of_a + j);
        const float common = total(products);
        for (long j = 0; j < each; j += LANES) {
            const Lanes of_logit = load(a + j) * (load(of_a + j) - common), share = of_logit * load(cosine + j);
            along += share;
            store(of_gram + i * each + j, of_logit * temperature / norms[i] / load(norms + each + j));
            store(of_squares + channels + j, load(of_squares + channels + j) - share * (temperature * 0.5f));
        }
        of_squares[i] = -0.5f * temperature * total(along);
        sum += total(along);
    }
    job->at[OF_TEMPERATURE][head] = sum + (picture > 0 ? job->at[OF_TEMPERATURE][head] : 0);
    for (long s = 0; s < 2; s++)
        for (long i = 0; i < each; i++) { /* a norm that was raised to the least one does not follow its squares */
            const float squares = job->at[SQUARES][(picture * 2 + s) * channels + head * each + i];
            of_squares[s * channels + i] = squares < LEAST_SQUARES ? 0 : of_squares[s * channels + i] / squares;
        }
}

static void mix(const Job *job, const Task *task) {
    const long channels = job->size[CHANNELS], width = job->size[WIDTH];
    const long first = (task->picture * job->size[HEIGHT] + task->top) * width;
    const long count = (task->bottom - task->top) * width;
    float *out = job->at[OUT] + first * channels;
    for (long p = 0; p < count; p += BLOCK) {
        const long pixels = p + BLOCK < count ? BLOCK : count - p;
        const float *x = job->at[X];
        if (x) memcpy(out + p * channels, x + (first + p) * channels, (size_t)(pixels * channels) * sizeof *out);
        multiply(job->at[PLANE0] + (first + p) * channels, channels, pixels, job->head[task->picture], out + p * channels,
                 channels, x != NULL);
    }
}

static void mix_back(const Job *job, const Task *task) {
    const long channels = job->size[CHANNELS], width = job->size[WIDTH];
    const long first = (task->picture * job->size[HEIGHT] + task->top) * width;
    const long count = (task->bottom - task->top) * width;
    float *of_mixer = share_of(job, task, OF_MIXER);
    for (long p = first; p < first + count; p += BLOCK) {
        const long pixels = p + BLOCK < first + count ? BLOCK : first + count - p;
        const float *gradient = job->at[GRADIENT] + p * channels;
        multiply(gradient, channels, pixels, job->head[task->picture], job->at[OUT] + p * channels, channels, 0);
        outer(gradient, channels, channels, job->at[PLANE0] + p * channels, channels, channels, pixels,
              of_mixer);
    }
}

/* --- Preparing and sharing out --- */

typedef void Work(const Job *, const Task *);
enum {
    CONVOLVE,
    CONVOLVE_BACK,
    EXPAND,
    PROJECT_BACK,
    GATE,
    GATE_BACK,
    CORRELATE,
    CORRELATE_BACK,
    MIX,
    MIX_BACK,
    LOW_PASS,
    LOW_PASS_BACK,
    KINDS
};
static Work *const work_of[KINDS] = {convolve,       convolve_back, expand,   project_back, gate,          gate_back, correlate,
                                     correlate_back, mix,           mix_back, low_pass,     low_pass_back};

static void add_pack(Job *job, const float *from, long rows, long columns, int turned, long depth, long to_columns) {
    job->pack[job->packs++] = (Pack){from, rows, columns, columns, turned, {NULL, depth, to_columns}};
}

static void add_sum(Job *job, int address, long planes, long rows, long padded_rows, long columns, long padded_columns) {
    const Sum sum = {address, 0, 0, planes, rows, columns, padded_rows, padded_columns, NULL};
    if (job->at[address]) job->sum[job->sums++] = sum;
}

/* Which matrices a kind needs, and how they lie; which sums it gives. */
static void plan(Job *job, int kind) {
    const long channels = job->size[CHANNELS], hidden = job->size[HIDDEN], padded = job->width, planes = job->planes;
    const int back = kind == GATE_BACK || kind == CORRELATE_BACK || kind == PROJECT_BACK;
    for (long s = 0; s < STREAMS; s++)
        if (job->at[MATRIX0 + s])
            add_pack(job, job->at[MATRIX0 + s], hidden, channels, !back, back ? hidden : channels, back ? channels : padded);
    if (kind == GATE) add_pack(job, job->at[LAST], channels, hidden, 1, hidden, channels);
    if (kind == GATE_BACK) add_pack(job, job->at[LAST], channels, hidden, 0, channels, padded);
    if (kind == CORRELATE) {
        const long each = channels / job->size[HEADS];
        add_sum(job, GRAM, 1, channels, channels, each, each);
        add_sum(job, SQUARES, 1, 2, 2, channels, channels);
    }
    if (kind == MIX_BACK) add_sum(job, OF_MIXER, 1, channels, channels, channels, channels);
    add_sum(job, OF_NORM, 1, 2, 2, channels, channels);
    add_sum(job, OF_MATRIX, planes, hidden, padded, channels, channels);
    add_sum(job, OF_OFFSET, planes, 1, 1, hidden, padded);
    add_sum(job, OF_LAST, 1, channels, channels, hidden, padded);
    add_sum(job, OF_KERNEL, planes, TAPS, TAPS, hidden, padded);
    for (Sum *sum = job->sum; sum < job->sum + job->sums; sum++) {
        sum->per_picture = kind == CORRELATE || kind == MIX_BACK || kind == LOW_PASS_BACK;
        sum->turned = sum->address == OF_KERNEL && kind != LOW_PASS_BACK;
    }
}

/* The small matrices of each picture: MIX's own, or what CORRELATE_BACK makes of the mixer's gradient, head by head. */
static void prepare_head(const Job *job, int kind, long index, float *room) {
    const long channels = job->size[CHANNELS], heads = job->size[HEADS], each = channels / heads;
    if (kind == MIX || kind == MIX_BACK)
        job->head[index] = packed(job->at[MIXER] + index * channels * channels, channels, kind == MIX,
                                  room + index * channels * channels);
    for (long picture = 0; kind == CORRELATE_BACK && picture < job->size[BATCH]; picture++) {
        scratch.used = 0;
        mixer_back(job, picture, index);
        for (long way = 0; way < 2; way++) {
            const long at = (picture * heads + index) * 2 + way;
            job->head[at] = packed(job->of_gram + gram_at(job, picture, index), each, way == 0, room + at * each * each);
        }
    }
}

/* (channels, 9) -> (9, padded). */
static void turn_taps(const float *from, long channels, long padded, float *to) {
    memset(to, 0, (size_t)(TAPS * padded) * sizeof *to);
    for (long c = 0; c < channels; c++)
        for (long i = 0; i < TAPS; i++) to[i * padded + c] = from[c * TAPS + i];
}

/* A row of a sum: the tasks' shares one after the other, so that it does not depend on threads. */
static void add_shares(const Job *job, const Sum *sum, long index) {
    const long rows = sum->planes * sum->rows, group = index / rows, row = index % rows;
    const long plane = row / sum->rows, tasks = sum->per_picture ? job->parts : job->parts * job->size[BATCH];
    const long size = size_of_share(sum), columns = sum->columns, rows_apart = plane * sum->padded_rows + row % sum->rows;
    const float *share = sum->shares + group * tasks * size + rows_apart * sum->padded_columns;
    float *to = job->at[sum->address];
    if (sum->turned)
        for (long c = 0; c < columns; c++) {
            float value = share[c];
            for (long t = 1; t < tasks; t++) value += share[t * size + c];
            to[(plane * columns + c) * sum->rows + row % sum->rows] = value;
        }
    else {
        to += index * columns;
        memcpy(to, share, (size_t)columns * sizeof *to);
        for (long t = 1; t < tasks; t++)
            for (long c = 0; c < columns; c++) to[c] += share[t * size + c];
    }
}

/* More than any kind takes from a thread's scratch. */
static size_t scratch_size(const Job *job) {
    const long band = band_of(job), row = row_size(job, job->width), channels = job->size[CHANNELS];
    const long most = (5 * band + 14) * row + (2 * band * job->size[WIDTH] + BLOCK) * channels;
    return (size_t)(most > attention_size(job) ? most : attention_size(job));
}

/* 0 where there is no memory. */
static int compute(Job *job, int kind, int threads) {
    const long channels = job->size[CHANNELS], heads = job->size[HEADS], batch = job->size[BATCH], each = channels / heads;
    const long tasks = batch * job->parts;
    const int low_passes = kind == LOW_PASS || kind == LOW_PASS_BACK;
    long kept = 0, size = 0;
    int failed = 0;
    plan(job, kind);
    if (kind == CORRELATE_BACK) job->heads = 2 * batch * heads, kept = job->heads * each * each;
    if (kind == MIX || kind == MIX_BACK) job->heads = batch, kept = batch * channels * channels;
    const long of_heads = kept, taps = job->at[KERNEL0] && !low_passes ? job->planes : 0;
    for (int i = 0; i < job->packs; i++) kept += job->pack[i].to.depth * job->pack[i].to.columns;
    kept += taps * TAPS * job->width;
    if (!reserve(&packed_matrices, (size_t)kept)) return 0;
    float *room_of_heads = take(&packed_matrices, (size_t)of_heads);
    for (int i = 0; i < job->packs; i++)
        job->pack[i].to.at = take(&packed_matrices, (size_t)(job->pack[i].to.depth * job->pack[i].to.columns));
    float *const turned = take(&packed_matrices, (size_t)(taps * TAPS * job->width));
    for (long s = 0; s < taps; s++) job->taps[s] = turned + s * TAPS * job->width;
    if (low_passes) job->taps[0] = job->at[KERNEL0];

    for (int i = 0; i < job->sums; i++) size += tasks * size_of_share(&job->sum[i]);
    if (kind == CORRELATE_BACK) size += batch * channels * (each + 2);
    float *const room = malloc((size_t)(size + 1) * sizeof *room), *at = room;
    job->head = malloc((size_t)(job->heads + 1) * sizeof *job->head);
    if (!room || !job->head) {
        free(room), free(job->head);
        return 0;
    }
    for (int i = 0; i < job->sums; i++) job->sum[i].shares = at, at += tasks * size_of_share(&job->sum[i]);
    if (kind == CORRELATE_BACK) job->of_gram = at, job->of_squares = at + batch * channels * each;

    const size_t pixels = (size_t)(batch * job->size[HEIGHT] * job->size[WIDTH]);
    expect(job->at[OUT], pixels * (size_t)channels);
    for (long s = 0; kind == EXPAND && s < job->planes; s++) expect(job->at[PLANE0 + s], pixels * (size_t)job->width);
#pragma omp parallel num_threads(threads)
    {
        const int ready = reserve(&scratch, scratch_size(job));
        if (!ready)
#pragma omp atomic write
            failed = 1;
        for (int i = 0; i < job->packs; i++) {
            const long panels = panels_of(job->pack[i].to.columns);
#pragma omp for schedule(static) nowait
            for (long panel = 0; panel < panels; panel++) pack_panel(&job->pack[i], panel);
        }
#pragma omp for schedule(static) nowait
        for (long s = 0; s < taps; s++)
            turn_taps(job->at[KERNEL0 + s], job->size[HIDDEN], job->width, turned + s * TAPS * job->width);
#pragma omp for schedule(dynamic)
        for (long index = 0; index < (kind == CORRELATE_BACK ? heads : job->heads); index++)
            if (ready) prepare_head(job, kind, index, room_of_heads);
#pragma omp for schedule(dynamic)
        for (long index = 0; index < tasks; index++) {
            const long part = job->size[PART], top = index % job->parts * part, height = job->size[HEIGHT];
            const Task task = {index / job->parts, top, top + part < height ? top + part : height, index};
            if (!ready) continue;
            for (const Sum *sum = job->sum; sum < job->sum + job->sums; sum++) {
                const long numbers = size_of_share(sum);
                memset(sum->shares + index * numbers, 0, (size_t)numbers * sizeof *sum->shares);
            }
            scratch.used = 0;
            work_of[kind](job, &task);
        }
        for (const Sum *sum = job->sum; sum < job->sum + job->sums; sum++) {
            const long rows = (sum->per_picture ? batch : 1) * sum->planes * sum->rows;
#pragma omp for schedule(static) nowait
            for (long row = 0; row < rows; row++) add_shares(job, sum, row);
        }
        if (kind == CORRELATE) {
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (long index = 0; index < batch * heads; index++)
                if (ready) {
                    scratch.used = 0;
                    mixer_of(job, index / heads, index % heads);
                }
        }
    }
    free(room), free(job->head);
    return !failed;
}

/* run(kind, addresses, sizes, epsilon, threads): addresses of contiguous memory, 0 where a kind has none. */
static PyObject *run(PyObject *self, PyObject *args) {
    (void)self;
    int kind, threads, done;
    PyObject *addresses, *sizes;
    Job job = {0};
    if (!PyArg_ParseTuple(args, "iOOfi", &kind, &addresses, &sizes, &job.epsilon, &threads)) return NULL;
    if (kind < 0 || kind >= KINDS || threads < 1 || PySequence_Size(addresses) != ADDRESSES || PySequence_Size(sizes) != SIZES) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "unknown kind, or not the addresses and sizes it takes");
        return NULL;
    }
    for (int i = 0; i < ADDRESSES + SIZES; i++) {
        PyObject *item = i < ADDRESSES ? PySequence_GetItem(addresses, i) : PySequence_GetItem(sizes, i - ADDRESSES);
        if (item == NULL) return NULL;
        const unsigned long long value = PyLong_AsUnsignedLongLong(item);
        Py_DECREF(item);
        if (PyErr_Occurred()) return NULL;
        if (i < ADDRESSES)
            job.at[i] = (float *)(uintptr_t)value;
        else
            job.size[i - ADDRESSES] = (long)value;
    }
    const long *size = job.size;
    if (size[BATCH] < 1 || size[HEIGHT] < 1 || size[WIDTH] < 1 || size[HEADS] < 1 || size[PART] < 1 || size[CHANNELS] % (size[HEADS] * LANES) ||
        size[PADDED] % LANES || size[PADDED] < size[HIDDEN] || size[COUNT_OF_STREAMS] > STREAMS) {
        PyErr_Format(PyExc_ValueError, "channels that are no multiple of %d, or no pixels", LANES);
        return NULL;
    }
    if ((kind == LOW_PASS || kind == LOW_PASS_BACK) && (size[HEIGHT] < 2 || size[WIDTH] < 2)) {
        PyErr_Format(PyExc_ValueError, "%ldx%ld pixels have none to reflect; a low-pass needs 2x2", size[HEIGHT], size[WIDTH]);
        return NULL;
    }
    job.norm = (Norm){job.at[WEIGHT], job.at[BIAS], job.epsilon, size[CHANNELS]};
    job.parts = (size[HEIGHT] + size[PART] - 1) / size[PART];
    job.planes = size[COUNT_OF_STREAMS], job.width = size[PADDED];
    Py_BEGIN_ALLOW_THREADS
    done = compute(&job, kind, threads);
    Py_END_ALLOW_THREADS
    if (!done) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"run", run, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, MODULE, NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC INIT(void) {
    if (!PROCESSOR_FITS) {
        PyErr_SetString(PyExc_ImportError, "this processor lacks the vectors that " MODULE " is built for");
        return NULL;
    }
    return PyModule_Create(&module);
}
