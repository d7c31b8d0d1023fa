/* Two loops over pixels that Python is too slow for.
 *
 * crop_png: a crop out of the inflated rows of a PNG picture. Undoes the row filters (PNG specification, section 9)
 * only as far down and as far to the right as the crop reaches. 8-bit RGB, not interlaced.
 *
 * planes: RGB bytes, pixel by pixel, to three planes of floats in [0, 1], turned on the way. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { PIXEL = 3, ROOM = 8 };

static void undo_sub(uint8_t *row, size_t n) {
    for (size_t i = PIXEL; i < n; i++) row[i] = (uint8_t)(row[i] + row[i - PIXEL]);
}

static void undo_up(uint8_t *row, const uint8_t *above, size_t n) {
    for (size_t i = 0; i < n; i++) row[i] = (uint8_t)(row[i] + above[i]);
}

static void undo_average(uint8_t *row, const uint8_t *above, size_t n) {
    for (size_t i = 0; i < PIXEL && i < n; i++) row[i] = (uint8_t)(row[i] + above[i] / 2);
    for (size_t i = PIXEL; i < n; i++)
        row[i] = (uint8_t)(row[i] + (row[i - PIXEL] + above[i]) / 2);
}

#ifdef __SSE2__
static __m128i load_pixel(const uint8_t *at) {
    int32_t four; /* rows have room behind them, so the fourth byte may be read */
    memcpy(&four, at, 4);
    return _mm_unpacklo_epi8(_mm_cvtsi32_si128(four), _mm_setzero_si128());
}

static __m128i magnitude(__m128i x) { return _mm_max_epi16(x, _mm_sub_epi16(_mm_setzero_si128(), x)); }

static __m128i choose(__m128i mask, __m128i yes, __m128i no) {
    return _mm_or_si128(_mm_and_si128(mask, yes), _mm_andnot_si128(mask, no));
}

static void undo_paeth(uint8_t *row, const uint8_t *above, size_t n) {
    __m128i left = _mm_setzero_si128(), corner = left;
    const __m128i bytes = _mm_set1_epi16(255);
    for (size_t i = 0; i + PIXEL <= n; i += PIXEL) {
        const __m128i up = load_pixel(above + i);
        const __m128i from_up = _mm_sub_epi16(up, corner), from_left = _mm_sub_epi16(left, corner);
        const __m128i to_left = magnitude(from_up), to_up = magnitude(from_left);
        const __m128i to_corner = magnitude(_mm_add_epi16(from_up, from_left));
        const __m128i least = _mm_min_epi16(to_corner, _mm_min_epi16(to_left, to_up));
        const __m128i guess = choose(_mm_cmpeq_epi16(least, to_left), left,
                                     choose(_mm_cmpeq_epi16(least, to_up), up, corner));
        left = _mm_and_si128(_mm_add_epi16(load_pixel(row + i), guess), bytes);
        corner = up;
        const int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(left, left));
        memcpy(row + i, &four, PIXEL);
    }
}
#else
static void undo_paeth(uint8_t *row, const uint8_t *above, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const int left = i >= PIXEL ? row[i - PIXEL] : 0;
        const int corner = i >= PIXEL ? above[i - PIXEL] : 0;
        const int up = above[i];
        const int to_left = abs(up - corner), to_up = abs(left - corner);
        const int to_corner = abs(up + left - 2 * corner);
        const int guess = to_left <= to_up && to_left <= to_corner ? left
                          : to_up <= to_corner                     ? up
                                                                   : corner;
        row[i] = (uint8_t)(row[i] + guess);
    }
}
#endif

/* rows: top + height rows of 1 + stride bytes; out: height * width * 3. -1 where a filter is unknown. */
static int crop(const uint8_t *rows, size_t stride, size_t top, size_t left, size_t height, size_t width,
                uint8_t *out, uint8_t *scratch) {
    const size_t n = (left + width) * PIXEL;
    uint8_t *row = scratch, *above = scratch + n + ROOM;
    memset(scratch, 0, 2 * (n + ROOM));
    for (size_t y = 0; y < top + height; y++) {
        const uint8_t *source = rows + y * (stride + 1);
        memcpy(row, source + 1, n);
        switch (source[0]) {
        case 0: break;
        case 1: undo_sub(row, n); break;
        case 2: undo_up(row, above, n); break;
        case 3: undo_average(row, above, n); break;
        case 4: undo_paeth(row, above, n); break;
        default: return -1;
        }
        if (y >= top) memcpy(out + (y - top) * width * PIXEL, row + left * PIXEL, width * PIXEL);
        uint8_t *swap = above;
        above = row;
        row = swap;
    }
    return 0;
}

static PyObject *png_crop(PyObject *self, PyObject *args) {
    (void)self;
    const char *data;
    Py_ssize_t size, picture, top, left, height, width;
    if (!PyArg_ParseTuple(args, "y#nnnnn", &data, &size, &picture, &top, &left, &height, &width)) return NULL;
    if (top < 0 || left < 0 || height < 1 || width < 1 || picture > 1 << 24 || left + width > picture ||
        top + height > size / (1 + PIXEL * picture)) {
        PyErr_SetString(PyExc_ValueError, "the crop is not inside of the rows");
        return NULL;
    }
    PyObject *result = PyBytes_FromStringAndSize(NULL, height * width * PIXEL);
    if (result == NULL) return NULL;
    uint8_t *out = (uint8_t *)PyBytes_AsString(result);
    uint8_t *scratch = malloc(2 * ((size_t)(left + width) * PIXEL + ROOM));
    int failed = -2;
    if (scratch != NULL) {
        Py_BEGIN_ALLOW_THREADS
        failed = crop((const uint8_t *)data, (size_t)picture * PIXEL, (size_t)top, (size_t)left,
                      (size_t)height, (size_t)width, out, scratch);
        Py_END_ALLOW_THREADS
        free(scratch);
    }
    if (failed) {
        Py_DECREF(result);
        if (failed == -2) return PyErr_NoMemory();
        PyErr_SetString(PyExc_ValueError, "a row has an unknown filter");
        return NULL;
    }
    return result;
}

enum { DOWN = 1, RIGHT = 2, OVER = 4 };

/* One row from left to right: written so that compilers find the vectors in it. */
static inline __attribute__((always_inline)) void spread(const uint8_t *restrict row, ptrdiff_t columns, float *restrict red,
                                                         float *restrict green, float *restrict blue) {
    for (ptrdiff_t x = 0; x < columns; x++) {
        red[x] = (float)row[PIXEL * x] / 255.0f;
        green[x] = (float)row[PIXEL * x + 1] / 255.0f;
        blue[x] = (float)row[PIXEL * x + 2] / 255.0f;
    }
}

static void spread_anywhere(const uint8_t *row, ptrdiff_t columns, float *red, float *green, float *blue) {
    spread(row, columns, red, green, blue);
}

#ifdef __x86_64__
__attribute__((target("avx2"))) static void spread_by_avx2(const uint8_t *row, ptrdiff_t columns, float *red, float *green,
                                                           float *blue) {
    spread(row, columns, red, green, blue);
}
#endif

static void mirror(float *row, ptrdiff_t columns) {
    for (ptrdiff_t x = 0; x < columns / 2; x++) {
        const float swap = row[x];
        row[x] = row[columns - 1 - x];
        row[columns - 1 - x] = swap;
    }
}

static void lay_out(const uint8_t *pixels, ptrdiff_t height, ptrdiff_t width, int turn, float *out) {
    /* Size of the result, and how far apart its neighbours lie in the source. */
    const ptrdiff_t rows = turn & OVER ? width : height, columns = turn & OVER ? height : width;
    ptrdiff_t down = PIXEL * (turn & OVER ? 1 : width), right = PIXEL * (turn & OVER ? width : 1);
    if (turn & DOWN) pixels += (rows - 1) * down, down = -down;
    float *red = out, *green = red + rows * columns, *blue = green + rows * columns;
    if (!(turn & OVER)) {
        void (*by)(const uint8_t *, ptrdiff_t, float *, float *, float *) = spread_anywhere;
#ifdef __x86_64__
        if (__builtin_cpu_supports("avx2")) by = spread_by_avx2;
#endif
        for (ptrdiff_t y = 0; y < rows; y++, red += columns, green += columns, blue += columns) {
            by(pixels + y * down, columns, red, green, blue);
            if (turn & RIGHT) mirror(red, columns), mirror(green, columns), mirror(blue, columns);
        }
        return;
    }
    float level[256];
    for (int i = 0; i < 256; i++) level[i] = (float)i / 255.0f;
    if (turn & RIGHT) pixels += (columns - 1) * right, right = -right;
    for (ptrdiff_t y = 0; y < rows; y++) {
        const uint8_t *at = pixels + y * down;
        for (ptrdiff_t x = 0; x < columns; x++, at += right) {
            *red++ = level[at[0]];
            *green++ = level[at[1]];
            *blue++ = level[at[2]];
        }
    }
}

static PyObject *planes(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer pixels, out;
    Py_ssize_t height, width;
    int turn;
    if (!PyArg_ParseTuple(args, "y*nniw*", &pixels, &height, &width, &turn, &out)) return NULL;
    const int fits = height > 0 && width > 0 && height < 1 << 24 && width < 1 << 24 &&
                     pixels.len == height * width * PIXEL &&
                     out.len == pixels.len * (Py_ssize_t)sizeof(float);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        lay_out(pixels.buf, height, width, turn, out.buf);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "the buffers do not have the picture's size");
    }
    PyBuffer_Release(&pixels);
    PyBuffer_Release(&out);
    if (!fits) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"crop_png", png_crop, METH_VARARGS,
     "crop_png(rows, picture_width, top, left, height, width) -> RGB bytes of the crop"},
    {"planes", planes, METH_VARARGS,
     "planes(pixels, height, width, turn, out): RGB bytes to planes of float32; turn adds 1 down, 2 right, 4 over"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_pixels", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__pixels(void) { return PyModule_Create(&module); }
