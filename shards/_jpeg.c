/* Decodes a crop of a JPEG picture with libjpeg-turbo: rows above are skipped, columns beside are not
 * transformed. A margin around the crop keeps the pixels equal to those of the whole picture: chroma is
 * interpolated across block borders. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jpeglib.h>

enum { MARGIN = 4, BLOCK = 16 };

struct failure {
    struct jpeg_error_mgr base;
    jmp_buf back;
};

static void give_up(j_common_ptr info) { longjmp(((struct failure *)info->err)->back, 1); }

/* A warning means damaged data: the caller decodes the whole picture then, by the library that judges it. */
static void on_message(j_common_ptr info, int level) {
    if (level < 0) give_up(info);
}

static void be_quiet(j_common_ptr info) { (void)info; }

/* 0, or -1 where the picture is of another kind or damaged. */
static int crop(const uint8_t *data, size_t size, size_t top, size_t left, size_t height, size_t width,
                uint8_t *out) {
    struct jpeg_decompress_struct info;
    struct failure failure;
    uint8_t *volatile row = NULL;
    info.err = jpeg_std_error(&failure.base);
    failure.base.error_exit = give_up;
    failure.base.emit_message = on_message;
    failure.base.output_message = be_quiet;
    if (setjmp(failure.back)) {
        jpeg_destroy_decompress(&info);
        free(row);
        return -1;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, (unsigned char *)data, (unsigned long)size);
    jpeg_read_header(&info, TRUE);
    if (info.num_components != 3 || info.jpeg_color_space == JCS_UNKNOWN ||
        top + height > info.image_height || left + width > info.image_width)
        give_up((j_common_ptr)&info);
    info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);
    JDIMENSION from = (JDIMENSION)(left > MARGIN ? left - MARGIN : 0);
    JDIMENSION across = (JDIMENSION)(left + width + MARGIN) - from;
    if (from + across > info.output_width) across = info.output_width - from;
    jpeg_crop_scanline(&info, &from, &across); /* moves `from` to the left, onto a block's border */
    row = malloc((size_t)info.output_width * 3);
    if (row == NULL) give_up((j_common_ptr)&info);
    JDIMENSION skip = (JDIMENSION)(top > MARGIN ? (top - MARGIN) / BLOCK * BLOCK : 0);
    if (skip && jpeg_skip_scanlines(&info, skip) != skip) give_up((j_common_ptr)&info);
    while (info.output_scanline < top + height) {
        const size_t y = info.output_scanline;
        JSAMPROW rows[1] = {row};
        if (jpeg_read_scanlines(&info, rows, 1) != 1) give_up((j_common_ptr)&info);
        if (y >= top) memcpy(out + (y - top) * width * 3, row + (left - from) * 3, width * 3);
    }
    jpeg_abort_decompress(&info);
    jpeg_destroy_decompress(&info);
    free(row);
    return 0;
}

static PyObject *jpeg_crop(PyObject *self, PyObject *args) {
    (void)self;
    const char *data;
    Py_ssize_t size, top, left, height, width;
    if (!PyArg_ParseTuple(args, "y#nnnn", &data, &size, &top, &left, &height, &width)) return NULL;
    if (top < 0 || left < 0 || height < 1 || width < 1 || height > 65500 || width > 65500) Py_RETURN_NONE;
    PyObject *result = PyBytes_FromStringAndSize(NULL, height * width * 3);
    if (result == NULL) return NULL;
    uint8_t *out = (uint8_t *)PyBytes_AsString(result);
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = crop((const uint8_t *)data, (size_t)size, (size_t)top, (size_t)left, (size_t)height, (size_t)width,
                  out);
    Py_END_ALLOW_THREADS
    if (failed) {
        Py_DECREF(result);
        Py_RETURN_NONE;
    }
    return result;
}

static PyMethodDef methods[] = {
    {"crop", jpeg_crop, METH_VARARGS,
     "crop(data, top, left, height, width) -> RGB bytes of the crop, or None where the picture is of another kind"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_jpeg", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__jpeg(void) { return PyModule_Create(&module); }
