/* Loops, blocking and threads of the float class of matmul (kernels/matmul_float.h): threads share out tiles of
 * outputs, and rows of x where outputs are few, never k. Which kernel takes a row of x depends on how many rows the
 * call has, not on threads or portions, and threads share out no fewer than MIN_ROWS rows, which all are summed in one
 * chain (multiply_tile), so that the number of threads changes no bit. */
#include "matmul_float.h"

#include <string.h>

#include "cpu.h"
#include "rows.h"
#include "scratch.h"
#include "threads.h"
#include "weights.h"

/* Rows of x that are taken together, and the bytes they may take where a row is long. Tiles of y stand on the stack. */
enum { MAX_ROWS_T = 128, MAX_ROWS_N = 64, MIN_ROWS = 8 };
static const ptrdiff_t prepared_bytes = 4 << 20;

/* Multiplications after which signals should be looked for: some 20 milliseconds of the slowest kernels. */
static const double longest = 1 << 26;

/* One weight matrix times some rows of x, which are counted through x's batch dimensions. x is prepared: for decode_t
 * row by row, else in panels of k, each of them row by row and without gaps, as what the caches hold of it is one panel
 * of all rows. */
typedef struct portion {
    const qz_kernels *kernels;
    const qz_float_kernels *plain;
    const qz_matmul_args *args;
    qz_matmul_job base; /* the weights, from their first row on */
    ptrdiff_t n, k, group_size;
    ptrdiff_t first, m; /* rows of x and y */
    int few;            /* x is prepared for decode_t */
    char *x;
    ptrdiff_t x_stride, staged; /* bytes from row to row; where few, the float32 row stands at `staged` in each */
    ptrdiff_t panel;            /* of k */
    ptrdiff_t tile, tiles, parts;
} portion;

/* `count` floats of a row of x from k on, zeros after its end. */
static void load_padded(const portion *p, float *to, const char *row, ptrdiff_t k, ptrdiff_t count) {
    const qz_array *x = &p->args->x;
    const ptrdiff_t left = qz_last(x) - k, some = left < count ? left : count;
    p->kernels->load(to, row + k * qz_last_stride(x), qz_last_stride(x), x->type, some);
    memset(to + some, 0, (size_t)(count - some) * sizeof *to);
}

static void prepare_rows(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const portion *p = context;
    const qz_array *x = &p->args->x;
    for (ptrdiff_t m = begin; m < end; m++) {
        const char *from = qz_element(x, x->ndim - 1, p->first + m);
        char *to = p->x + m * p->x_stride;
        if (p->few) {
            float *row = (float *)(to + p->staged);
            load_padded(p, row, from, 0, p->k);
            p->plain->prepare((float *)to, row, p->k, p->group_size);
            continue;
        }
        for (ptrdiff_t k = 0; k < p->k; k += p->panel, to += p->m * p->x_stride) {
            const ptrdiff_t count = p->k - k < p->panel ? p->k - k : p->panel;
            load_padded(p, (float *)to, from, k, count);
        }
    }
}

static void move_in_k(qz_matmul_job *job, const qz_matmul_args *args, ptrdiff_t k) {
    const ptrdiff_t group = k / job->group_size;
    if (args->transpose) {
        job->w += k * qz_formats[args->format].bits / 8;
        job->scales.scales += group * job->scales.scale_group_stride;
        job->scales.biases += group * job->scales.bias_group_stride;
    } else {
        job->w += k * job->w_row_stride;
        job->scales.scales += k * job->scales.scale_row_stride;
        job->scales.biases += k * job->scales.bias_row_stride;
    }
}

void qz_multiply_float_tile(const qz_float_kernels *plain, const qz_matmul_args *args, const qz_matmul_job *job,
                            int few, ptrdiff_t panel_bytes) {
    const int transpose = args->transpose;
    const ptrdiff_t k = transpose ? job->columns : job->rows, panel = transpose ? QZ_FLOAT_PANEL_T : QZ_FLOAT_PANEL_N;
    if (few) {
        plain->decode_t(job);
        return;
    }
    memset(job->y, 0, (size_t)(job->m * (transpose ? QZ_FLOAT_OUTPUTS : QZ_FLOAT_OUTPUTS_N)) * sizeof *job->y);
    for (ptrdiff_t at = 0; at < k; at += panel) {
        const ptrdiff_t count = k - at < panel ? k - at : panel;
        qz_matmul_job some = *job;
        *(transpose ? &some.columns : &some.rows) = count;
        some.x += at / panel * panel_bytes;
        move_in_k(&some, args, at);
        if (transpose) {
            plain->prefill_t(&some);
        } else {
            plain->matmul_n(&some);
        }
    }
}

static void store_tile(const portion *p, float *y, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t column,
                       ptrdiff_t outputs) {
    const qz_array *to = &p->args->y;
    const ptrdiff_t pitch = p->args->transpose ? QZ_FLOAT_OUTPUTS : QZ_FLOAT_OUTPUTS_N, stride = qz_last_stride(to);
    const ptrdiff_t count = outputs < qz_last(to) - column ? outputs : qz_last(to) - column;
    for (ptrdiff_t m = 0; m < rows; m++) {
        char *row = qz_element(to, to->ndim - 1, p->first + first + m) + column * stride;
        qz_store_results(p->kernels, p->args, row, y + m * pitch, count);
    }
}

static void multiply_tiles(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const portion *p = context;
    _Alignas(64) float y[MAX_ROWS_N * QZ_FLOAT_OUTPUTS_N];
    _Static_assert(MAX_ROWS_T * QZ_FLOAT_OUTPUTS <= MAX_ROWS_N * QZ_FLOAT_OUTPUTS_N, "y holds a tile of either kind");
    for (ptrdiff_t piece = begin; piece < end; piece++) {
        const ptrdiff_t column = piece / p->parts * p->tile, part = piece % p->parts;
        const ptrdiff_t first = p->m * part / p->parts, last = p->m * (part + 1) / p->parts;
        const ptrdiff_t outputs = p->n - column < p->tile ? p->n - column : p->tile;
        qz_matmul_job job = p->base;
        job.rows = p->args->transpose ? outputs : p->k;
        job.columns = p->args->transpose ? p->k : outputs;
        job.x = p->x + first * p->x_stride;
        job.x_stride = p->x_stride;
        job.m = last - first;
        job.y = y;
        qz_move_to_output(&job, p->args, column);
        qz_multiply_float_tile(p->plain, p->args, &job, p->few, p->m * p->x_stride);
        store_tile(p, y, first, job.m, column, outputs);
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
    return qz_product_grain(p->tiles * p->parts, work / (double)p->parts, threads);
}

static qz_status multiply_portion(portion *p, int64_t *polled, const qz_run *run) {
    qz_status status = qz_poll_between(run, polled);
    if (status == QZ_OK) status = qz_parallel(prepare_rows, p, p->m, 16384 / (p->k + 1) + 1, run);
    if (status != QZ_OK) return status;
    const ptrdiff_t grain = share_out(p, run);
    return qz_parallel(multiply_tiles, p, p->tiles * p->parts, grain, run);
}

/* Sets how x is prepared, and returns how many of `rows` rows are taken together: portions are nearly of one size. A
 * line of the cache between rows keeps them from falling into the same of its sets. */
static ptrdiff_t plan_rows(portion *p, ptrdiff_t rows, qz_arena *arena) {
    const int transpose = p->args->transpose;
    p->few = transpose && rows <= QZ_FLOAT_FEW;
    p->panel = transpose ? QZ_FLOAT_PANEL_T : QZ_FLOAT_PANEL_N;
    p->staged = p->few ? (ptrdiff_t)((p->plain->prepared_size(p->k, p->group_size) + 63) / 64 * 64) : 0;
    p->x_stride = p->few ? p->staged + p->k * 4 : p->panel * 4 + 64;
    const ptrdiff_t panels = p->few ? 1 : (p->k + p->panel - 1) / p->panel, row = panels * p->x_stride;
    ptrdiff_t most = transpose ? MAX_ROWS_T : MAX_ROWS_N;
    if (row && most > prepared_bytes / row) most = prepared_bytes / row;
    if (most < MIN_ROWS) most = MIN_ROWS;
    const ptrdiff_t portions = (rows + most - 1) / most, some = (rows + portions - 1) / portions;
    p->x = qz_arena_take(arena, (size_t)some * (size_t)row);
    return some;
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
    p.n = qz_padded_outputs(args);
    p.k = qz_padded_inputs(args);
    p.group_size = qz_formats[args->format].group_sizes[args->group_slot];
    if (matrices * rows == 0 || p.n == 0) return QZ_OK;
    if (qz_weights_are_shared(args)) {
        rows *= matrices;
        matrices = 1;
    }
    qz_arena arena;
    qz_arena_open(&arena);
    const ptrdiff_t most = plan_rows(&p, rows, &arena);
    const size_t size = (size_t)args->w.shape[dims] * (size_t)qz_last(&args->w) * 4;
    char *words = apart ? qz_arena_take(&arena, size) : NULL;
    qz_status status = QZ_NO_MEMORY;
    if (p.x && (words || !apart)) status = multiply_matrices(&p, words, matrices, rows, most, run);
    qz_arena_release(&arena);
    return status;
}
