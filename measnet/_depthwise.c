/* Depth-wise 3×3 convolutions with zero padding on fp32 BHWC features, alone and with the gate of the feed-forward part.
 *
 *   convolve:           out = dw(x, k)
 *   convolve_gradients: dx and dk, from the gradient of out
 *   gate:               out = gelu(dw(a, ka)) · dw(b, kb)
 *   gate_gradients:     da, db, dka, dkb; both convolutions are computed again, which costs less than reading them back
 *
 * Kernels are (9, C), C a multiple of 8. Work is cut into tasks, each a part of one picture's rows, in the same way for any number of threads; gradients of kernels are given per part of rows, (B · parts, 9, C), and summed by
 * the caller: so results do not depend on the threads. Those shares must be zeros at the start.
 *
 * Threads are those of the OpenMP runtime that torch has loaded; a second runtime would compete for the same cores. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __x86_64__
#pragma GCC target("avx2,fma") /* asked for at import; without them torch does the work */
#endif

enum {
    LANES = 8,
    GROUP = 4,        /* pixels side by side that share a load of the kernel */
    PART = 32,        /* rows of a task */
    STRIP_SIZE = 4096, /* numbers of a row that are worked on at once: six such rows fit into a second-level cache */
    TAPS = 9,
};

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Whole __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *a, *b, *kernel_a, *kernel_b, *gradient;
    float *out_a, *out_b, *out_kernel_a, *out_kernel_b;
    long batch, height, width, channels, parts, strip;
} Job;

/* A row's pixels from `first` on; a row of zeros has a step of 0. */
typedef struct {
    const float *at;
    long step, first;
} Row;

/* Columns from..to of rows top..bottom of one picture. */
typedef struct {
    long top, bottom, from, to, offset, share;
} Task;

INLINE Lanes load(const float *from) {
    Lanes lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

INLINE void store(float *to, Lanes lanes) { memcpy(to, &lanes, sizeof lanes); }

INLINE Lanes choose(Whole mask, Lanes yes, Lanes no) {
    return (Lanes)((mask & (Whole)yes) | (~mask & (Whole)no));
}

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

/* Normal distribution at x and its density times x; Abramowitz and Stegun 7.1.26, error of the distribution < 1e-7. */
INLINE void normal(Lanes x, Lanes *distribution, Lanes *weighted_density) {
    const Whole negative = x < 0.0f;
    const Lanes size = choose(negative, -x, x);
    const Lanes bell = exponential(size * size * -0.5f);
    const Lanes t = 1.0f / (1.0f + 0.3275911f * 0.707106781f * size);
    Lanes tail = t * 1.061405429f - 1.453152027f;
    tail = tail * t + 1.421413741f;
    tail = tail * t - 0.284496736f;
    tail = tail * t + 0.254829592f;
    tail = tail * t * bell * 0.5f;
    *distribution = choose(negative, tail, 1.0f - tail);
    *weighted_density = x * bell * 0.398942280f;
}

INLINE Row row_of(const Job *job, const float *tensor, const Task *task, long y, const float *zeros) {
    if (y < 0 || y >= job->height) return (Row){zeros, 0, 0};
    return (Row){tensor + task->offset + y * job->width * job->channels, job->channels, 0};
}

INLINE void rows_around(const Job *job, const float *tensor, const Task *task, long y, const float *zeros, Row rows[3]) {
    for (int down = 0; down < 3; down++) rows[down] = row_of(job, tensor, task, y + down - 1, zeros);
}

/* Where the pixels around `count` pixels from x on are: three rows of count + 2. */
INLINE void neighbours(const Job *job, const Row rows[3], long x, int count, const float *zeros,
                       const float *at[3][GROUP + 2]) {
    for (int down = 0; down < 3; down++)
        for (int right = 0; right < count + 2; right++) {
            const long there = x + right - 1;
            const int inside = there >= 0 && there < job->width;
            at[down][right] = inside ? rows[down].at + (there - rows[down].first) * rows[down].step : zeros;
        }
}

/* Eight channels of `count` pixels; a kernel turned by half a turn gives the gradient of the input. */
INLINE void correlate(const float *const at[3][GROUP + 2], int count, const float *kernel, long channels, long c,
                      int turned, Lanes sums[GROUP]) {
    for (int pixel = 0; pixel < count; pixel++) sums[pixel] = (Lanes){0};
    for (int tap = 0; tap < TAPS; tap++) {
        const Lanes weight = load(kernel + (turned ? TAPS - 1 - tap : tap) * channels + c);
        for (int pixel = 0; pixel < count; pixel++) sums[pixel] += load(at[tap / 3][pixel + tap % 3] + c) * weight;
    }
}

INLINE void correlate_pixels(const Job *job, const Row rows[3], const float *kernel, long x, int count, int turned,
                             const float *zeros, float *out) {
    const float *at[3][GROUP + 2];
    const long channels = job->channels;
    neighbours(job, rows, x, count, zeros, at);
    for (long c = 0; c < channels; c += LANES) {
        Lanes sums[GROUP];
        correlate(at, count, kernel, channels, c, turned, sums);
        for (int pixel = 0; pixel < count; pixel++) store(out + (x + pixel) * channels + c, sums[pixel]);
    }
}

INLINE void correlate_row(const Job *job, const Row rows[3], const float *kernel, const Task *task, int turned,
                          const float *zeros, float *out) {
    long x = task->from;
    for (; x + GROUP <= task->to; x += GROUP) correlate_pixels(job, rows, kernel, x, GROUP, turned, zeros, out);
    for (; x < task->to; x++) correlate_pixels(job, rows, kernel, x, 1, turned, zeros, out);
}

/* Adds what some pixels give to the kernel's gradient, (9, C). */
INLINE void add_pixels(const Job *job, const Row rows[3], Row gradient, long x, int count, const float *zeros,
                       float *of_kernel) {
    const float *at[3][GROUP + 2];
    const long channels = job->channels;
    neighbours(job, rows, x, count, zeros, at);
    const float *from = gradient.at + (x - gradient.first) * gradient.step;
    for (long c = 0; c < channels; c += LANES) {
        Lanes gradients[GROUP];
        for (int pixel = 0; pixel < count; pixel++) gradients[pixel] = load(from + pixel * channels + c);
        for (int tap = 0; tap < TAPS; tap++) {
            Lanes sum = load(of_kernel + tap * channels + c);
            for (int pixel = 0; pixel < count; pixel++)
                sum += load(at[tap / 3][pixel + tap % 3] + c) * gradients[pixel];
            store(of_kernel + tap * channels + c, sum);
        }
    }
}

INLINE void add_row(const Job *job, const Row rows[3], Row gradient, const Task *task, const float *zeros,
                    float *of_kernel) {
    long x = task->from;
    for (; x + GROUP <= task->to; x += GROUP) add_pixels(job, rows, gradient, x, GROUP, zeros, of_kernel);
    for (; x < task->to; x++) add_pixels(job, rows, gradient, x, 1, zeros, of_kernel);
}

static void convolve(const Job *job, const Task *task, float *scratch) {
    Row rows[3];
    for (long y = task->top; y < task->bottom; y++) {
        rows_around(job, job->a, task, y, scratch, rows);
        correlate_row(job, rows, job->kernel_a, task, 0, scratch,
                      job->out_a + task->offset + y * job->width * job->channels);
    }
}

static void convolve_gradients(const Job *job, const Task *task, float *scratch) {
    Row rows[3];
    for (long y = task->top; y < task->bottom; y++) {
        rows_around(job, job->gradient, task, y, scratch, rows);
        const Row middle = rows[1];
        correlate_row(job, rows, job->kernel_a, task, 1, scratch,
                      job->out_a + task->offset + y * job->width * job->channels);
        rows_around(job, job->a, task, y, scratch, rows);
        add_row(job, rows, middle, task, scratch, job->out_kernel_a + task->share);
    }
}

/* dw(a) and dw(b) of eight channels of `count` pixels, and what gelu needs of the first. */
typedef struct {
    Lanes a[GROUP], b[GROUP], distribution[GROUP], density[GROUP];
} Gate;

INLINE void gate_of(const Job *job, const float *const at_a[3][GROUP + 2], const float *const at_b[3][GROUP + 2], int count,
                    long c, Gate *gate) {
    correlate(at_a, count, job->kernel_a, job->channels, c, 0, gate->a);
    correlate(at_b, count, job->kernel_b, job->channels, c, 0, gate->b);
    for (int pixel = 0; pixel < count; pixel++)
        normal(gate->a[pixel], &gate->distribution[pixel], &gate->density[pixel]);
}

INLINE void gate_pixels(const Job *job, const Row rows_a[3], const Row rows_b[3], long x, int count, const float *zeros,
                        float *out) {
    const float *at_a[3][GROUP + 2], *at_b[3][GROUP + 2];
    const long channels = job->channels;
    neighbours(job, rows_a, x, count, zeros, at_a);
    neighbours(job, rows_b, x, count, zeros, at_b);
    for (long c = 0; c < channels; c += LANES) {
        Gate gate;
        gate_of(job, at_a, at_b, count, c, &gate);
        for (int pixel = 0; pixel < count; pixel++)
            store(out + (x + pixel) * channels + c, gate.a[pixel] * gate.distribution[pixel] * gate.b[pixel]);
    }
}

static void gate(const Job *job, const Task *task, float *scratch) {
    Row rows_a[3], rows_b[3];
    for (long y = task->top; y < task->bottom; y++) {
        rows_around(job, job->a, task, y, scratch, rows_a);
        rows_around(job, job->b, task, y, scratch, rows_b);
        float *out = job->out_a + task->offset + y * job->width * job->channels;
        long x = task->from;
        for (; x + GROUP <= task->to; x += GROUP) gate_pixels(job, rows_a, rows_b, x, GROUP, scratch, out);
        for (; x < task->to; x++) gate_pixels(job, rows_a, rows_b, x, 1, scratch, out);
    }
}

/* Gradients of dw(a) and dw(b) at some pixels. */
INLINE void gate_gradient_pixels(const Job *job, const Row rows_a[3], const Row rows_b[3], const float *gradient, long x,
                                 int count, const float *zeros, float *of_a, float *of_b) {
    const float *at_a[3][GROUP + 2], *at_b[3][GROUP + 2];
    const long channels = job->channels;
    neighbours(job, rows_a, x, count, zeros, at_a);
    neighbours(job, rows_b, x, count, zeros, at_b);
    for (long c = 0; c < channels; c += LANES) {
        Gate gate;
        gate_of(job, at_a, at_b, count, c, &gate);
        for (int pixel = 0; pixel < count; pixel++) {
            const Lanes g = load(gradient + pixel * channels + c), distribution = gate.distribution[pixel];
            store(of_a + pixel * channels + c, g * gate.b[pixel] * (distribution + gate.density[pixel]));
            store(of_b + pixel * channels + c, g * gate.a[pixel] * distribution);
        }
    }
}

static void gate_gradients(const Job *job, const Task *task, float *scratch) {
    const long channels = job->channels;
    const long first = task->from > 0 ? task->from - 1 : 0; /* one more column on either side: its neighbours need it */
    const long last = task->to < job->width ? task->to + 1 : job->width;
    const long length = (last - first) * channels;
    float *const of_a = scratch + channels, *const of_b = of_a + 3 * length; /* the last three rows of each */
    Row rows_a[3], rows_b[3];
    for (long y = task->top - 1; y <= task->bottom; y++) { /* and one more row */
        const long slot = (y + 3) % 3 * length;
        if (y >= 0 && y < job->height) {
            rows_around(job, job->a, task, y, scratch, rows_a);
            rows_around(job, job->b, task, y, scratch, rows_b);
            const float *gradient = job->gradient + task->offset + y * job->width * channels;
            for (long x = first; x < last;) {
                const long at = slot + (x - first) * channels;
                const int count = x + GROUP <= last ? GROUP : 1;
                if (count == GROUP)
                    gate_gradient_pixels(job, rows_a, rows_b, gradient + x * channels, x, GROUP, scratch, of_a + at,
                                         of_b + at);
                else
                    gate_gradient_pixels(job, rows_a, rows_b, gradient + x * channels, x, 1, scratch, of_a + at,
                                         of_b + at);
                x += count;
            }
        }
        const long done = y - 1;
        if (done < task->top) continue;
        for (int down = 0; down < 3; down++) {
            const long there = done + down - 1, at = (there + 3) % 3 * length;
            const int inside = there >= 0 && there < job->height;
            rows_a[down] = inside ? (Row){of_a + at, channels, first} : (Row){scratch, 0, 0};
            rows_b[down] = inside ? (Row){of_b + at, channels, first} : (Row){scratch, 0, 0};
        }
        const Row gradient_a = rows_a[1], gradient_b = rows_b[1];
        const long offset = task->offset + done * job->width * channels;
        correlate_row(job, rows_a, job->kernel_a, task, 1, scratch, job->out_a + offset);
        correlate_row(job, rows_b, job->kernel_b, task, 1, scratch, job->out_b + offset);
        rows_around(job, job->a, task, done, scratch, rows_a);
        add_row(job, rows_a, gradient_a, task, scratch, job->out_kernel_a + task->share);
        rows_around(job, job->b, task, done, scratch, rows_b);
        add_row(job, rows_b, gradient_b, task, scratch, job->out_kernel_b + task->share);
    }
}

/* A task: some rows of one picture, strip by strip. */
static void work_on(void (*work)(const Job *, const Task *, float *), const Job *job, long index, float *scratch) {
    Task task;
    task.top = index % job->parts * PART;
    task.bottom = task.top + PART < job->height ? task.top + PART : job->height;
    task.offset = index / job->parts * job->height * job->width * job->channels;
    task.share = index * TAPS * job->channels;
    for (task.from = 0; task.from < job->width; task.from = task.to) {
        task.to = task.from + job->strip < job->width ? task.from + job->strip : job->width;
        work(job, &task, scratch);
    }
}

typedef void Work(const Job *, const Task *, float *);
static Work *const work_of[] = {convolve, convolve_gradients, gate, gate_gradients};
enum { KINDS = sizeof work_of / sizeof *work_of };

/* run(kind, a, b, kernel_a, kernel_b, gradient, out_a, out_b, out_kernel_a, out_kernel_b, B, H, W, C, threads):
 * addresses of contiguous memory, 0 where a kind has none. */
static PyObject *run(PyObject *self, PyObject *args) {
    (void)self;
    int kind, threads, failed = 0;
    unsigned long long at[9];
    Job job;
    if (!PyArg_ParseTuple(args, "iKKKKKKKKKlllli", &kind, &at[0], &at[1], &at[2], &at[3], &at[4], &at[5], &at[6], &at[7],
                          &at[8], &job.batch, &job.height, &job.width, &job.channels, &threads))
        return NULL;
    if (kind < 0 || kind >= KINDS || job.channels % LANES ||  threads < 1) {
        PyErr_SetString(PyExc_ValueError, "unknown kind, or channels that are no multiple of 8");
        return NULL;
    }
    job.a = (const float *)(uintptr_t)at[0], job.b = (const float *)(uintptr_t)at[1];
    job.kernel_a = (const float *)(uintptr_t)at[2], job.kernel_b = (const float *)(uintptr_t)at[3];
    job.gradient = (const float *)(uintptr_t)at[4];
    job.out_a = (float *)(uintptr_t)at[5], job.out_b = (float *)(uintptr_t)at[6];
    job.out_kernel_a = (float *)(uintptr_t)at[7], job.out_kernel_b = (float *)(uintptr_t)at[8];
    job.parts = (job.height + PART - 1) / PART;
    const long tasks = job.batch * job.parts;
    job.strip = STRIP_SIZE / job.channels > 2 * GROUP ? STRIP_SIZE / job.channels : 2 * GROUP;
    Work *const work = work_of[kind];
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel num_threads(threads)
    {
        /* zeros for one pixel, then room for six rows of a strip and what is beside it */
        float *scratch = calloc((size_t)(job.channels * (1 + 6 * (job.strip + 2))), sizeof *scratch);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < tasks; task++) {
            if (scratch != NULL)
                work_on(work, &job, task, scratch);
            else
#pragma omp atomic write
                failed = 1;
        }
        free(scratch);
    }
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"run", run, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_depthwise", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__depthwise(void) {
#ifdef __x86_64__
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        PyErr_SetString(PyExc_ImportError, "this processor has no AVX2 and FMA");
        return NULL;
    }
#endif
    return PyModule_Create(&module);
}
