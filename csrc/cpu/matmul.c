/* Loops, blocking and threads of the exact class of matmul: x is prepared once for all weights, threads share out tiles
 * of outputs (and rows of x where outputs are few), never k. */
#include <string.h>

#include "cpu.h"
#include "rows.h"
#include "scratch.h"
#include "select.h"
#include "threads.h"
#include "weights.h"

/* Rows of x that are prepared together, and the bytes they may take where a row is long. */
enum { MAX_ROWS_T = 128, MAX_ROWS_N = 32, MIN_ROWS = 8 };
static const size_t prepared_bytes = (size_t)4 << 20;

/* One weight matrix times some rows of x. Rows are counted through x's batch dimensions. */
typedef struct chunk {
    const qz_plan *plan;
    const qz_format_kernels *kernels;
    const qz_matmul_kernel *kernel; /* of y = x Wᵀ */
    const qz_matmul_args *args;
    qz_matmul_job base;         /* the weights, from their first row on */
    ptrdiff_t n, k, group_size; /* of the weights; x and y may leave out the padding of the last group */
    ptrdiff_t first, m;         /* rows of x and y */
    char *x;                    /* prepared; m * x_stride bytes */
    size_t x_stride, staged;    /* in each of them the float32 row, if x is not read in place, stands at `staged` */
    int in_place;
    char *not_finite; /* [m]: 1 where the definition takes over */
    ptrdiff_t tiles, tile, parts;
    int64_t *polled; /* when qz_run.poll was last asked: jobs of a call may all be too short to do so */
} chunk;

static const float *row_as_f32(const chunk *c, ptrdiff_t m) {
    const qz_array *x = &c->args->x;
    const char *from = qz_element(x, x->ndim - 1, c->first + m);
    float *to = (float *)(c->x + (size_t)m * c->x_stride + c->staged);
    if (c->in_place) return (const float *)from;
    c->plan->kernels->load(to, from, qz_last_stride(x), x->type, qz_last(x));
    memset(to + qz_last(x), 0, (size_t)(c->k - qz_last(x)) * sizeof *to);
    return to;
}

static void prepare_rows(void *context, ptrdiff_t begin, ptrdiff_t end) {
    chunk *c = context;
    for (ptrdiff_t m = begin; m < end; m++) {
        const float *row = row_as_f32(c, m);
        if (!c->args->transpose) continue;
        char *to = c->x + (size_t)m * c->x_stride;
        c->not_finite[m] = !c->kernel->prepare_x(to, row, c->k);
    }
}

/* Sets what the job of a tile has of its own: the weights of outputs [column, column + tile). */
static void set_tile(qz_matmul_job *job, const chunk *c, ptrdiff_t column) {
    const ptrdiff_t count = c->n - column < c->tile ? c->n - column : c->tile;
    job->w = c->base.w;
    job->scales.scales = c->base.scales.scales;
    job->scales.biases = c->base.scales.biases;
    qz_move_to_output(job, c->args, column);
    if (c->args->transpose) {
        job->rows = count;
    } else {
        job->columns = count;
    }
}

static void store_tile(const chunk *c, const qz_matmul_job *job, ptrdiff_t first, ptrdiff_t column) {
    const qz_array *y = &c->args->y;
    ptrdiff_t stride = qz_last_stride(y);
    ptrdiff_t count = c->args->transpose ? job->rows : job->columns;
    if (count > qz_last(y) - column) count = qz_last(y) - column;
    for (ptrdiff_t m = 0; m < job->m; m++) {
        if (c->not_finite[first + m]) continue;
        char *to = qz_element(y, y->ndim - 1, c->first + first + m) + column * stride;
        qz_store_results(c->plan->kernels, c->args, to, job->y + m * job->y_stride, count);
    }
}

static void multiply_tiles(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const chunk *c = context;
    _Alignas(64) float y[MAX_ROWS_T * QZ_PREFILL_ROWS];
    _Static_assert(QZ_TILE_ROWS <= QZ_PREFILL_ROWS && MAX_ROWS_N * QZ_TILE_COLUMNS <= MAX_ROWS_T * QZ_PREFILL_ROWS,
                   "y holds a tile of every kind");
    qz_matmul_job job = c->base;
    job.rows = job.columns = c->k;
    job.x_stride = (ptrdiff_t)c->x_stride;
    job.y = y;
    job.y_stride = c->tile;
    for (ptrdiff_t piece = begin; piece < end; piece++) {
        ptrdiff_t column = piece * c->tile, first = 0, last = c->m;
        if (c->parts > 1) {
            const ptrdiff_t part = piece % c->parts;
            column = piece / c->parts * c->tile;
            first = c->m * part / c->parts;
            last = c->m * (part + 1) / c->parts;
        }
        set_tile(&job, c, column);
        job.x = c->x + (size_t)first * c->x_stride + (c->args->transpose ? 0 : c->staged);
        job.m = last - first;
        if (c->args->transpose) {
            c->kernel->multiply(&job);
        } else {
            c->kernels->matmul_n[c->args->digits - 1](&job);
        }
        store_tile(c, &job, first, column);
    }
}

static int is_prefill(const chunk *c) { return c->kernel == &c->kernels->prefill_t[c->args->digits - 1]; }

/* Multiplications after which signals should be looked for, though k be long: 10 to 40 milliseconds of portable C, 1 to
 * 15 of vectors. Each job makes panels of weights anew, so that more and shorter ones would cost. */
static double longest(const chunk *c) { return c->plan->kernels == qz_definition() ? 1 << 24 : 1 << 26; }

/* A call that nobody shares and nobody stops: done in one task, in few jobs, each of which costs as much as some rows
 * of a small matrix. */
static int is_small(const qz_run *run) { return run->threads == 1 && !run->poll; }

/* Outputs of a tile of y = x W. Few rows of x leave the time to reading the weights, whose rows are then to be read in
 * as long runs as threads allow: memory delivers runs of half a kilobyte at less than half its speed. Then one tile for
 * each thread, as long as y holds it and it is not too long for one job. */
static ptrdiff_t tile_of_columns(const chunk *c, ptrdiff_t threads) {
    ptrdiff_t tile = QZ_TILE_COLUMNS;
    const ptrdiff_t share = (c->n + threads - 1) / threads;
    if (c->m < MIN_ROWS && share > tile) {
        const double most = longest(c) / ((double)c->k * (double)c->m);
        const ptrdiff_t room = MAX_ROWS_T * QZ_PREFILL_ROWS / c->m / QZ_MAX_GROUP * QZ_MAX_GROUP;
        const ptrdiff_t whole = (share + QZ_MAX_GROUP - 1) / QZ_MAX_GROUP * QZ_MAX_GROUP;
        const ptrdiff_t widest = whole < room ? whole : room;
        while (tile < widest && (double)(tile + QZ_MAX_GROUP) <= most) tile += QZ_MAX_GROUP;
        return tile;
    }
    while (tile > c->group_size && c->n / tile < 4 * threads) tile /= 2;
    return tile;
}

/* Outputs of a tile of y = x Wᵀ: many, which read x from the first cache where all of it does not fit there, but not so
 * many that threads wait for each other, nor too many for one job. */
static ptrdiff_t tile_of_rows(const chunk *c, const qz_run *run, ptrdiff_t threads) {
    if (is_prefill(c) || is_small(run)) return QZ_PREFILL_ROWS;
    if (c->n / QZ_PREFILL_ROWS < 8 * threads) return QZ_TILE_ROWS;
    return (double)QZ_PREFILL_ROWS * (double)c->k * (double)c->m > longest(c) ? QZ_TILE_ROWS : QZ_PREFILL_ROWS;
}

static void share_out(chunk *c, const qz_run *run, ptrdiff_t *grain) {
    ptrdiff_t threads = run->threads ? run->threads : qz_get_num_threads();
    c->tile = c->args->transpose ? tile_of_rows(c, run, threads) : tile_of_columns(c, threads);
    c->tiles = (c->n + c->tile - 1) / c->tile;
    c->parts = threads > 1 && c->m >= MIN_ROWS ? (4 * threads + c->tiles - 1) / c->tiles : 1;
    if (c->parts > 1 && c->parts > c->m / MIN_ROWS) c->parts = c->m / MIN_ROWS;
    double pieces = (double)c->tile * (double)c->k * (double)c->m / longest(c);
    if ((double)c->parts < pieces) c->parts = pieces < (double)c->m ? (ptrdiff_t)pieces + 1 : c->m;
    double work = (double)c->tile * (double)c->k * (double)c->m / (double)c->parts;
    *grain = qz_product_grain(c->tiles * c->parts, work, threads);
}

/* Rows with NaN or Inf, one after the other, by the scalar definition. `record` has room for one prepared row. */
static qz_status multiply_not_finite(const chunk *c, char *record, const qz_run *run) {
    const qz_kernels *definition = qz_definition();
    qz_plan plan = {c->plan->device, definition};
    for (ptrdiff_t m = 0; m < c->m; m++) {
        if (!c->not_finite[m]) continue;
        char finite = 0;
        ptrdiff_t grain;
        chunk one = *c;
        one.plan = &plan;
        one.kernels = definition->format(c->args->format, c->args->group_slot);
        one.kernel = &one.kernels->decode_t[c->args->digits - 1];
        one.first = c->first + m;
        one.m = 1;
        one.not_finite = &finite;
        qz_status status = qz_poll_between(run, c->polled);
        if (status != QZ_OK) return status;
        one.kernel->prepare_x(record, row_as_f32(c, m), c->k);
        one.x = record;
        share_out(&one, run, &grain);
        status = qz_parallel(multiply_tiles, &one, one.tiles * one.parts, grain, run);
        if (status != QZ_OK) return status;
    }
    return QZ_OK;
}

/* All of a chunk, as one task. */
static void do_chunk(void *context, ptrdiff_t begin, ptrdiff_t end) {
    chunk *c = context;
    (void)begin, (void)end;
    if (c->args->transpose || !c->in_place) prepare_rows(c, 0, c->m);
    multiply_tiles(c, 0, c->tiles * c->parts);
}

static qz_status multiply_chunk(chunk *c, char *record, const qz_run *run) {
    ptrdiff_t grain = 16384 / (c->k + 1) + 1;
    memset(c->not_finite, 0, (size_t)c->m);
    if (is_small(run)) {
        share_out(c, run, &grain);
        const qz_status done = qz_parallel(do_chunk, c, 1, 1, run);
        return done == QZ_OK ? multiply_not_finite(c, record, run) : done;
    }
    qz_status status = qz_poll_between(run, c->polled);
    if (status == QZ_OK && (c->args->transpose || !c->in_place))
        status = qz_parallel(prepare_rows, c, c->m, grain, run);
    if (status != QZ_OK) return status;
    share_out(c, run, &grain);
    status = qz_parallel(multiply_tiles, c, c->tiles * c->parts, grain, run);
    return status == QZ_OK ? multiply_not_finite(c, record, run) : status;
}

/* ---- the matrices of a call ---- */

/* All scratch of a call, taken before anything is written: the prepared rows, one row for the definition, flags, and a
 * copy of the words of a matrix whose rows are not contiguous. */
typedef struct buffers {
    char *x, *record, *not_finite, *words;
    ptrdiff_t max_rows;
} buffers;

static int take_buffers(buffers *b, chunk *c, ptrdiff_t rows, qz_arena *arena) {
    const qz_matmul_args *a = c->args;
    const qz_array *w = &a->w;
    size_t k = (size_t)c->k, digits = (size_t)a->digits - 1;
    const qz_format_kernels *definition = qz_definition()->format(a->format, a->group_slot);
    const int few = qz_is_few(c->kernels, rows, a->digits);
    c->kernel = few ? &c->kernels->decode_t[digits] : &c->kernels->prefill_t[digits];
    int strided = qz_words_are_apart(w);
    c->in_place = a->transpose && a->x.type == QZ_F32 && qz_last_stride(&a->x) == 4 && qz_is_aligned(&a->x);
    c->in_place = c->in_place && qz_last(&a->x) == c->k;
    c->staged = a->transpose ? (c->kernel->prepared_size(c->k) + 63) / 64 * 64 : 0;
    c->x_stride = c->staged + (c->in_place ? 0 : (k * sizeof(float) + 63) / 64 * 64);
    /* An odd number of lines: rows at a multiple of a power of two would share few places of the caches. */
    if (c->x_stride) c->x_stride = (c->x_stride / 64 | 1) * 64;
    b->max_rows = a->transpose ? MAX_ROWS_T : MAX_ROWS_N;
    if (c->x_stride && (size_t)b->max_rows > prepared_bytes / c->x_stride) {
        b->max_rows = (ptrdiff_t)(prepared_bytes / c->x_stride);
    }
    if (b->max_rows < MIN_ROWS) b->max_rows = MIN_ROWS;
    if (b->max_rows > rows) b->max_rows = rows;
    b->x = qz_arena_take(arena, (size_t)b->max_rows * c->x_stride);
    b->not_finite = qz_arena_take(arena, (size_t)b->max_rows);
    b->record = a->transpose ? qz_arena_take(arena, definition->decode_t[digits].prepared_size(c->k)) : NULL;
    b->words = strided ? qz_arena_take(arena, (size_t)w->shape[w->ndim - 2] * (size_t)qz_last(w) * 4) : NULL;
    return b->x && b->not_finite && (b->record || !a->transpose) && (b->words || !strided);
}

static qz_status multiply_matrices(chunk *c, const buffers *b, ptrdiff_t matrices, ptrdiff_t rows, const qz_run *run) {
    qz_status status = QZ_OK;
    int64_t polled = 0;
    c->polled = &polled;
    c->x = b->x;
    c->not_finite = b->not_finite;
    for (ptrdiff_t matrix = 0; matrix < matrices && status == QZ_OK; matrix++) {
        status = qz_point_at_weights(&c->base, c->args, matrix, b->words, run);
        for (ptrdiff_t first = 0; first < rows && status == QZ_OK; first += b->max_rows) {
            c->first = matrix * rows + first;
            c->m = rows - first < b->max_rows ? rows - first : b->max_rows;
            status = multiply_chunk(c, b->record, run);
        }
    }
    return status;
}

qz_status qz_cpu_matmul(const qz_plan *plan, const qz_matmul_args *args, const qz_run *run) {
    if (args->digits == 0) return qz_cpu_matmul_float(plan, args, run);
    const int dims = args->x.ndim - 2;
    ptrdiff_t batch = qz_count(&args->x, dims), rows = args->x.shape[dims];
    chunk c; /* set piece by piece: to clear it takes longer than a row of a small matrix */
    buffers b;
    c.plan = plan;
    c.args = args;
    c.n = qz_padded_outputs(args);
    c.k = qz_padded_inputs(args);
    if (batch * rows == 0 || c.n == 0) return QZ_OK;
    c.kernels = plan->kernels->format(args->format, args->group_slot);
    c.group_size = qz_formats[args->format].group_sizes[args->group_slot];
    int shared = qz_weights_are_shared(args);
    if (shared) {
        rows *= batch;
        batch = 1;
    }
    qz_arena arena;
    qz_arena_open(&arena);
    qz_status status = QZ_NO_MEMORY;
    if (take_buffers(&b, &c, rows, &arena)) status = multiply_matrices(&c, &b, batch, rows, run);
    qz_arena_release(&arena);
    return status;
}
