/* Loops, blocking and threads of the float class of matmul (kernels/matmul_float.h): threads share out tiles of
 * outputs, and rows of x where outputs are few, never k. Which kernel takes a row of x depends on how many rows the
 * call has, not on threads or portions, so that the number of threads changes no bit. */
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "rows.h"
#include "scratch.h"
#include "threads.h"
#include "weights.h"

/* Rows of x that are taken together, and the bytes they may take where a row is long. Tiles of y stand on the stack. */
enum { MAX_ROWS_T = 128, MAX_ROWS_N = 64, MIN_ROWS = 8 };
static const size_t prepared_bytes = (size_t)4 << 20;

/* Multiplications in a piece of work that make it worth handing out (some 20 microseconds), and those after which
 * signals should be looked for (some 20 milliseconds of the slowest kernels). */
static const double worthwhile = 400000, longest = 1 << 26;

/* One weight matrix times some rows of x, which are counted through x's batch dimensions. */
typedef struct portion {
    const qz_kernels *kernels;
    const qz_float_kernels *plain;
    const qz_matmul_args *args;
    qz_matmul_job base; /* the weights, from their first row on */
    ptrdiff_t n, k, group_size;
    ptrdiff_t first, m; /* rows of x and y */
    int few;            /* x is prepared for decode_t */
    char *x;            /* NULL: read in place. Else rows that kernels take, x_stride bytes each; */
    ptrdiff_t x_stride, staged; /* where they are prepared, the float32 row stands at `staged` in each */
    ptrdiff_t tile, tiles, parts;
} portion;

static char *row_of_x(const portion *p, ptrdiff_t m) {
    const qz_array *x = &p->args->x;
    return qz_element(x, x->ndim - 1, p->first + m);
}

static void prepare_rows(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const portion *p = context;
    const qz_array *x = &p->args->x;
    for (ptrdiff_t m = begin; m < end; m++) {
        char *to = p->x + m * p->x_stride;
        float *row = (float *)(to + p->staged);
        p->kernels->load(row, row_of_x(p, m), qz_last_stride(x), x->type, p->k);
        if (p->few) p->plain->prepare((float *)to, row, p->k, p->group_size);
    }
}

/* The job of outputs [column, column + tile), but for x and y. */
static qz_matmul_job job_of_tile(const portion *p, ptrdiff_t column) {
    qz_matmul_job job = p->base;
    const ptrdiff_t count = p->n - column < p->tile ? p->n - column : p->tile;
    job.rows = p->args->transpose ? count : p->k;
    job.columns = p->args->transpose ? p->k : count;
    if (p->args->transpose) {
        job.w += column * job.w_row_stride;
        job.scales.scales += column * job.scales.scale_row_stride;
        job.scales.biases += column * job.scales.bias_row_stride;
    } else {
        job.w += column * qz_formats[p->args->format].bits / 8;
        job.scales.scales += column / p->group_size * job.scales.scale_group_stride;
        job.scales.biases += column / p->group_size * job.scales.bias_group_stride;
    }
    return job;
}

static void store_tile(const portion *p, const qz_matmul_job *job, ptrdiff_t first, ptrdiff_t column) {
    const qz_array *y = &p->args->y;
    const ptrdiff_t pitch = p->args->transpose ? QZ_FLOAT_OUTPUTS : QZ_FLOAT_OUTPUTS_N, stride = qz_last_stride(y);
    const ptrdiff_t count = p->args->transpose ? job->rows : job->columns;
    for (ptrdiff_t m = 0; m < job->m; m++) {
        char *to = qz_element(y, y->ndim - 1, p->first + first + m) + column * stride;
        p->kernels->store(to, stride, y->type, job->y + m * pitch, count);
    }
}

static void multiply_tiles(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const portion *p = context;
    _Alignas(64) float y[MAX_ROWS_N * QZ_FLOAT_OUTPUTS_N];
    _Static_assert(MAX_ROWS_T * QZ_FLOAT_OUTPUTS <= MAX_ROWS_N * QZ_FLOAT_OUTPUTS_N, "y holds a tile of either kind");
    for (ptrdiff_t piece = begin; piece < end; piece++) {
        const ptrdiff_t column = piece / p->parts * p->tile, part = piece % p->parts;
        const ptrdiff_t first = p->m * part / p->parts, last = p->m * (part + 1) / p->parts;
        qz_matmul_job job = job_of_tile(p, column);
        job.x = p->x ? p->x + first * p->x_stride : row_of_x(p, first);
        job.x_stride = p->x_stride;
        job.m = last - first;
        job.y = y;
        if (p->few) {
            p->plain->decode_t(&job);
        } else if (p->args->transpose) {
            p->plain->prefill_t(&job);
        } else {
            p->plain->matmul_n(&job);
        }
        store_tile(p, &job, first, column);
    }
}

static ptrdiff_t share_out(portion *p, const qz_run *run) {
    const ptrdiff_t threads = run->threads ? run->threads : qz_get_num_threads();
    p->tile = p->args->transpose ? QZ_FLOAT_OUTPUTS : QZ_FLOAT_OUTPUTS_N;
    p->tiles = (p->n + p->tile - 1) / p->tile;
    p->parts = threads == 1 ? 1 : (4 * threads + p->tiles - 1) / p->tiles;
    if (p->parts > p->m / MIN_ROWS) p->parts = p->m / MIN_ROWS;
    if (p->parts < 1) p->parts = 1;
    const double work = (double)p->tile * (double)p->k * (double)p->m, pieces = work / longest;
    if ((double)p->parts < pieces) p->parts = pieces < (double)p->m ? (ptrdiff_t)pieces + 1 : p->m;
    const double each = work / (double)p->parts;
    return each < worthwhile ? (ptrdiff_t)(worthwhile / (each + 1)) + 1 : 1;
}

static qz_status multiply_portion(portion *p, int64_t *polled, const qz_run *run) {
    qz_status status = qz_poll_between(run, polled);
    if (status == QZ_OK && p->x) status = qz_parallel(prepare_rows, p, p->m, 16384 / (p->k + 1) + 1, run);
    if (status != QZ_OK) return status;
    const ptrdiff_t grain = share_out(p, run);
    return qz_parallel(multiply_tiles, p, p->tiles * p->parts, grain, run);
}

/* Rows of x that one kernel call may take from where they are: float32, one after the other with one stride. */
static int is_in_place(const qz_array *x) {
    const int rows = x->ndim - 2;
    for (int i = 0; i < rows; i++) {
        if (x->shape[i] != 1 && x->strides[i] != x->strides[i + 1] * x->shape[i + 1]) return 0;
    }
    return x->type == QZ_F32 && qz_last_stride(x) == 4 && qz_is_aligned(x);
}

/* Sets how x is read, and returns how many of `rows` rows are taken together: in portions of nearly the same size. */
static ptrdiff_t plan_rows(portion *p, ptrdiff_t rows) {
    const qz_matmul_args *a = p->args;
    const size_t row = ((size_t)p->k * sizeof(float) + 63) / 64 * 64;
    p->few = a->transpose && rows <= QZ_FLOAT_FEW;
    p->staged = p->few ? (ptrdiff_t)((p->plain->prepared_size(p->k, p->group_size) + 63) / 64 * 64) : 0;
    p->x_stride = p->staged + (ptrdiff_t)row;
    ptrdiff_t most = a->transpose ? MAX_ROWS_T : MAX_ROWS_N;
    if (p->x_stride && (size_t)most > prepared_bytes / (size_t)p->x_stride) {
        most = (ptrdiff_t)(prepared_bytes / (size_t)p->x_stride);
    }
    if (most < MIN_ROWS) most = MIN_ROWS;
    const ptrdiff_t portions = (rows + most - 1) / most;
    return (rows + portions - 1) / portions;
}

static qz_status multiply_matrices(portion *p, char *words, ptrdiff_t matrices, ptrdiff_t rows, ptrdiff_t most,
                                   const qz_run *run) {
    qz_status status = QZ_OK;
    int64_t polled = 0;
    for (ptrdiff_t matrix = 0; matrix < matrices && status == QZ_OK; matrix++) {
        status = qz_point_at_weights(&p->base, p->args, matrix, words, run);
        for (ptrdiff_t first = 0; first < rows && status == QZ_OK; first += most) {
            p->first = matrix * rows + first;
            p->m = rows - first < most ? rows - first : most;
            status = multiply_portion(p, &polled, run);
        }
    }
    return status;
}

qz_status qz_cpu_matmul_float(const qz_plan *plan, const qz_matmul_args *args, const qz_run *run) {
    const int dims = args->x.ndim - 2, apart = qz_words_are_apart(&args->w);
    const qz_format_kernels *kernels = plan->kernels->format(args->format, args->group_slot);
    ptrdiff_t matrices = qz_count(&args->x, dims), rows = args->x.shape[dims];
    portion p = {.kernels = plan->kernels, .plain = &kernels->plain, .args = args};
    p.n = qz_last(&args->y);
    p.k = qz_last(&args->x);
    p.group_size = qz_formats[args->format].group_sizes[args->group_slot];
    if (matrices * rows == 0 || p.n == 0) return QZ_OK;
    if (qz_weights_are_shared(args)) {
        rows *= matrices;
        matrices = 1;
    }
    const ptrdiff_t most = plan_rows(&p, rows);
    const int in_place = !p.few && is_in_place(&args->x);
    if (in_place) p.x_stride = args->x.strides[dims];
    p.x = in_place ? NULL : qz_scratch((size_t)most * (size_t)p.x_stride);
    char *words = apart ? qz_scratch((size_t)args->w.shape[dims] * (size_t)qz_last(&args->w) * 4) : NULL;
    qz_status status = QZ_NO_MEMORY;
    if ((p.x || in_place) && (words || !apart)) status = multiply_matrices(&p, words, matrices, rows, most, run);
    free(p.x);
    free(words);
    return status;
}
