/* Loops, blocking and threads of products with gathered matrices. The matrices of y are taken in the order of the
 * weights that they need, so that all rows of x that meet the same weights follow each other; segments of them are
 * multiplied together, and codes are decoded once for all rows of a segment. As many segments as there is room for
 * their prepared rows of x make a portion, whose segments and tiles of outputs threads share out, never k. */
#include <string.h>

#include "cpu.h"
#include "matmul_float.h"
#include "rows.h"
#include "scratch.h"
#include "select.h"
#include "threads.h"
#include "weights.h"

/* Rows of a segment; outputs of a tile of theirs stand on the stack. In the float class bits depend on the kernel and
 * on the height of its tiles of rows: segments cut for the threads' sake have at least half of MIN_ROWS rows, whose
 * tiles are all of one kind (matmul_float.c), and what is cut otherwise is the same for every number of threads. */
enum { MAX_ROWS_T = 128, MAX_ROWS_N = 32, MAX_ROWS_FLOAT_N = 64, MIN_ROWS = 16, TILE_FLOATS = 8192 };
_Static_assert(MAX_ROWS_T *QZ_PREFILL_ROWS <= TILE_FLOATS && MAX_ROWS_T * QZ_FLOAT_OUTPUTS <= TILE_FLOATS &&
                   MAX_ROWS_N * QZ_TILE_COLUMNS <= TILE_FLOATS && MAX_ROWS_FLOAT_N * QZ_FLOAT_OUTPUTS_N <= TILE_FLOATS,
               "a tile of every kind fits");

/* A portion: its segments, rows of x, and the bytes that these may take where they are long. */
enum { MAX_SEGMENTS = 256, MAX_SLOTS = 1024 };
static const size_t prepared_bytes = (size_t)4 << 20;

/* Multiplications after which signals should be looked for: some 20 ms of the slowest kernels of each class. */
static const double longest = 1 << 24, longest_float = 1 << 26;

/* How a row of x is prepared, and by which kernels multiplied: as float32, for either kernel of the exact class, or for
 * few rows of the float class. */
typedef enum form { PLAIN, DECODE, PREFILL, FEW } form;

/* A prepared row of x. */
typedef struct slot {
    ptrdiff_t row; /* counted through x's batch dimensions */
    form form;
    char not_finite; /* the definition takes over */
} slot;

/* Consecutive rows of y, as sorted, whose weights are the same. Their rows of x stand in consecutive slots. */
typedef struct segment {
    ptrdiff_t matrix, first, m, slot;
    form form;
} segment;

/* Where a matrix of x stands already. */
typedef struct place {
    ptrdiff_t portion, slot;
} place;

typedef struct gather {
    const qz_plan *plan;
    const qz_format_kernels *kernels;
    const qz_gather_args *args;
    const qz_matmul_args *product; /* the arrays */
    ptrdiff_t n, k, group_size;    /* of the weights; x and y may leave out the padding of the last group */
    ptrdiff_t m, total;            /* rows of a matrix of x, and of all of y */
    const ptrdiff_t *order;        /* matrices of y by their weights */
    ptrdiff_t runs;                /* distinct weights */
    ptrdiff_t threads, tile, tiles, most;
    size_t stride, staged; /* bytes from slot to slot; the float32 row, if x is not read in place, stands at `staged` */
    int in_place;
    char *x, *record, *words; /* slots; one for the definition; a copy of words that are apart */
    slot *slots;
    segment *segments;
    place *places; /* by matrices of x; NULL where there are more of those than of y */
    ptrdiff_t max_slots, max_segments;
    /* The present run of rows with the same weights, of which `part` of `parts` segments are laid out. */
    ptrdiff_t run_first, run_last, part, parts;
    /* The present portion. */
    ptrdiff_t portion, used, count, copied; /* slots, segments; the matrix in `words` */
    int64_t polled;
} gather;

/* ---- order ---- */

/* 0 ... count - 1 on their way to be sorted by keys, equal ones in order: by some bits at a time, lowest first. */
enum { SORT_BITS = 11, RADIX = 1 << SORT_BITS };
typedef struct sorting {
    const ptrdiff_t *keys;
    ptrdiff_t *order, *other; /* as they are, and as the present pass leaves them */
    ptrdiff_t most, runs;     /* the largest key; distinct keys */
    int shift, sorted;
    ptrdiff_t *starts; /* of each digit in `other` */
} sorting;

static void scan_keys(void *context, ptrdiff_t begin, ptrdiff_t end) {
    sorting *s = context;
    for (ptrdiff_t i = begin; i < end; i++) {
        s->order[i] = i;
        s->most = s->keys[i] > s->most ? s->keys[i] : s->most;
        s->sorted = s->sorted && (i == 0 || s->keys[i - 1] <= s->keys[i]);
    }
}

static void count_digits(void *context, ptrdiff_t begin, ptrdiff_t end) {
    sorting *s = context;
    for (ptrdiff_t i = begin; i < end; i++) s->starts[(s->keys[i] >> s->shift) % RADIX + 1]++;
}

static void move_by_digit(void *context, ptrdiff_t begin, ptrdiff_t end) {
    sorting *s = context;
    for (ptrdiff_t i = begin; i < end; i++)
        s->other[s->starts[(s->keys[s->order[i]] >> s->shift) % RADIX]++] = s->order[i];
}

static void count_runs(void *context, ptrdiff_t begin, ptrdiff_t end) {
    sorting *s = context;
    for (ptrdiff_t i = begin; i < end; i++) s->runs += i == 0 || s->keys[s->order[i]] != s->keys[s->order[i - 1]];
}

/* Sorts `order` with the help of `other`; either may hold the result in the end. `run` has one thread: a step goes
 * through its elements from the first to the last, and stops where signals ask it to. */
static qz_status sort(sorting *s, ptrdiff_t count, const qz_run *run) {
    enum { PIECE = 1 << 16 };
    ptrdiff_t starts[RADIX + 1];
    s->starts = starts;
    qz_status status = qz_parallel(scan_keys, s, count, PIECE, run);
    for (; status == QZ_OK && !s->sorted && s->most >> s->shift > 0; s->shift += SORT_BITS) {
        memset(starts, 0, sizeof starts);
        status = qz_parallel(count_digits, s, count, PIECE, run);
        for (int digit = 0; digit < RADIX; digit++) starts[digit + 1] += starts[digit];
        if (status == QZ_OK) status = qz_parallel(move_by_digit, s, count, PIECE, run);
        ptrdiff_t *former = s->order;
        s->order = s->other;
        s->other = former;
    }
    return status == QZ_OK ? qz_parallel(count_runs, s, count, PIECE, run) : status;
}

static ptrdiff_t matrix_of_row(const gather *g, ptrdiff_t row) { return g->args->rhs[g->order[row / g->m]]; }
static ptrdiff_t x_row(const gather *g, ptrdiff_t row) {
    return g->args->lhs[g->order[row / g->m]] * g->m + row % g->m;
}
static ptrdiff_t y_row(const gather *g, ptrdiff_t row) { return g->order[row / g->m] * g->m + row % g->m; }

/* ---- portions ---- */

static form form_of_rows(const gather *g, ptrdiff_t m) {
    if (!g->product->transpose) return PLAIN;
    if (g->product->digits > 0) return qz_is_few(g->kernels, m, g->product->digits) ? DECODE : PREFILL;
    return g->run_last - g->run_first <= QZ_FLOAT_FEW ? FEW : PLAIN;
}

/* The run that begins at this row, and its segments, nearly all of one size. As rows are sorted, its end is found in
 * steps that double until they overshoot, and then halve. */
static void begin_run(gather *g, ptrdiff_t first) {
    const ptrdiff_t matrix = matrix_of_row(g, first);
    ptrdiff_t last = first, step = g->m;
    while (step < g->total - last && matrix_of_row(g, last + step) == matrix) {
        last += step;
        step *= 2;
    }
    for (; step >= g->m; step /= 2) {
        if (step < g->total - last && matrix_of_row(g, last + step) == matrix) last += step;
    }
    last += g->m;
    g->run_first = first;
    g->run_last = last;
    g->part = 0;
    g->parts = form_of_rows(g, 0) == FEW ? 1 : (last - first + g->most - 1) / g->most;
}

/* Gives the segment slots: those of its matrix of x, if it is one and they are prepared, else new ones. Returns 0 if
 * there is no room. */
static int take_slots(gather *g, segment *s) {
    place *known = NULL;
    if (g->places && s->m == g->m && s->first % g->m == 0) known = &g->places[g->args->lhs[g->order[s->first / g->m]]];
    /* The float class prepares the same rows in two ways, by how many meet the same weights. */
    if (known && known->portion == g->portion && g->slots[known->slot].form == s->form) {
        s->slot = known->slot;
        return 1;
    }
    if (g->used + s->m > g->max_slots) return 0;
    s->slot = g->used;
    for (ptrdiff_t i = 0; i < s->m; i++) g->slots[g->used++] = (slot){x_row(g, s->first + i), s->form, 0};
    if (known) *known = (place){g->portion, s->slot};
    return 1;
}

/* Lays out segments from a row on, as many as there is room for. Returns the row after them. */
static ptrdiff_t lay_out(gather *g, ptrdiff_t row) {
    g->portion++;
    g->used = g->count = 0;
    while (row < g->total && g->count < g->max_segments) {
        if (row == g->run_last) begin_run(g, row);
        const ptrdiff_t rows = g->run_last - g->run_first, last = g->run_first + rows * (g->part + 1) / g->parts;
        segment s = {matrix_of_row(g, row), row, last - row, 0, form_of_rows(g, last - row)};
        if (g->words && g->count > 0 && s.matrix != g->segments[0].matrix) break; /* there is one copy */
        if (!take_slots(g, &s)) break;
        g->segments[g->count++] = s;
        g->part++;
        row = last;
    }
    return row;
}

/* ---- the work of threads ---- */

static const qz_matmul_kernel *kernel_of(const gather *g, form form) {
    const ptrdiff_t digits = g->product->digits - 1;
    return form == DECODE ? &g->kernels->decode_t[digits] : &g->kernels->prefill_t[digits];
}

static const float *row_as_f32(const gather *g, char *to, ptrdiff_t row) {
    const qz_array *x = &g->product->x;
    const char *from = qz_element(x, x->ndim - 1, row);
    float *floats = (float *)(to + g->staged);
    if (g->in_place) return (const float *)from;
    g->plan->kernels->load(floats, from, qz_last_stride(x), x->type, qz_last(x));
    memset(floats + qz_last(x), 0, (size_t)(g->k - qz_last(x)) * sizeof *floats);
    return floats;
}

static void prepare_slots(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const gather *g = context;
    for (ptrdiff_t i = begin; i < end; i++) {
        slot *s = &g->slots[i];
        char *to = g->x + (size_t)i * g->stride;
        const float *row = row_as_f32(g, to, s->row);
        if (s->form == FEW) {
            g->kernels->plain.prepare((float *)to, row, g->k, g->group_size);
        } else if (s->form != PLAIN) {
            s->not_finite = !kernel_of(g, s->form)->prepare_x(to, row, g->k);
        }
    }
}

static void store_tile(const gather *g, const segment *s, const qz_matmul_job *job, ptrdiff_t column, ptrdiff_t count) {
    const qz_array *y = &g->product->y;
    const ptrdiff_t stride = qz_last_stride(y);
    if (count > qz_last(y) - column) count = qz_last(y) - column;
    for (ptrdiff_t m = 0; m < s->m; m++) {
        if (g->slots[s->slot + m].not_finite) continue;
        char *to = qz_element(y, y->ndim - 1, y_row(g, s->first + m)) + column * stride;
        qz_store_results(g->plan->kernels, g->product, to, job->y + m * job->y_stride, count);
    }
}

static void multiply_job(const gather *g, form form, const qz_matmul_job *job) {
    if (form == DECODE || form == PREFILL) {
        kernel_of(g, form)->multiply(job);
    } else if (g->product->digits > 0) {
        g->kernels->matmul_n[g->product->digits - 1](job);
    } else {
        const ptrdiff_t panel = g->product->transpose ? QZ_FLOAT_PANEL_T : QZ_FLOAT_PANEL_N;
        qz_multiply_float_tile(&g->kernels->plain, g->product, job, form == FEW, panel * (ptrdiff_t)sizeof(float));
    }
}

/* A piece is a tile of outputs of a segment. */
static void multiply_pieces(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const gather *g = context;
    const int transpose = g->product->transpose;
    _Alignas(64) float y[TILE_FLOATS];
    for (ptrdiff_t piece = begin; piece < end; piece++) {
        const segment *s = &g->segments[piece / g->tiles];
        const ptrdiff_t first = piece % g->tiles * g->tile, last = g->n - first < g->tile ? g->n : first + g->tile;
        const ptrdiff_t step = s->form == DECODE ? QZ_TILE_ROWS : g->tile;
        qz_matmul_job weights;
        qz_point_at_weights(&weights, g->product, s->matrix, NULL, NULL);
        if (g->words) {
            weights.w = (const uint8_t *)g->words;
            weights.w_row_stride = qz_last(&g->product->w) * 4;
        }
        for (ptrdiff_t column = first; column < last; column += step) {
            const ptrdiff_t count = last - column < step ? last - column : step;
            qz_matmul_job job = weights;
            job.rows = transpose ? count : g->k;
            job.columns = transpose ? g->k : count;
            job.x = g->x + (size_t)s->slot * g->stride + (s->form == PLAIN ? g->staged : 0);
            job.x_stride = (ptrdiff_t)g->stride;
            job.m = s->m;
            job.y = y;
            job.y_stride = step;
            qz_move_to_output(&job, g->product, column);
            multiply_job(g, s->form, &job);
            store_tile(g, s, &job, column, count);
        }
    }
}

/* ---- runs of work ---- */

static qz_status multiply_segments(gather *g, const qz_run *run) {
    double rows = 0;
    for (ptrdiff_t i = 0; i < g->count; i++) rows += (double)g->segments[i].m;
    const double work = rows / (double)g->count * (double)g->tile * (double)g->k;
    const ptrdiff_t pieces = g->count * g->tiles, grain = qz_product_grain(pieces, work, g->threads);
    return qz_parallel(multiply_pieces, g, pieces, grain, run);
}

/* Rows with NaN or Inf, one after the other, by the scalar definition. */
static qz_status multiply_not_finite(const gather *g, const qz_run *run) {
    const qz_plan plan = {g->plan->device, qz_definition()};
    slot finite = {0};
    segment alone = {0};
    gather one = *g;
    one.plan = &plan;
    one.kernels = plan.kernels->format(g->product->format, g->product->group_slot);
    one.x = g->record;
    one.slots = &finite;
    one.segments = &alone;
    one.count = 1;
    qz_status status = QZ_OK;
    for (ptrdiff_t i = 0; i < g->count; i++) {
        const segment *s = &g->segments[i];
        for (ptrdiff_t m = 0; m < s->m && status == QZ_OK; m++) {
            const slot *from = &g->slots[s->slot + m];
            if (!from->not_finite) continue;
            alone = (segment){s->matrix, s->first + m, 1, 0, DECODE};
            status = qz_poll_between(run, &one.polled);
            if (status != QZ_OK) break;
            const float *row = row_as_f32(g, g->x + (size_t)(s->slot + m) * g->stride, from->row);
            kernel_of(&one, DECODE)->prepare_x(g->record, row, g->k);
            status = multiply_segments(&one, run);
        }
    }
    return status;
}

static qz_status multiply_portion(gather *g, const qz_run *run) {
    const ptrdiff_t matrix = g->segments[0].matrix;
    qz_status status = qz_poll_between(run, &g->polled);
    if (status == QZ_OK && g->words && g->copied != matrix) {
        qz_matmul_job unused;
        status = qz_point_at_weights(&unused, g->product, matrix, g->words, run);
        g->copied = matrix;
    }
    if (status == QZ_OK) status = qz_parallel(prepare_slots, g, g->used, 16384 / (g->k + 1) + 1, run);
    if (status == QZ_OK) status = multiply_segments(g, run);
    return status == QZ_OK ? multiply_not_finite(g, run) : status;
}

/* ---- a call ---- */

static size_t rounded(size_t size) { return (size + 63) / 64 * 64; }

/* How large slots are. A line of the cache between rows keeps them from falling into the same of its sets. */
static void size_slots(gather *g) {
    const qz_matmul_args *a = g->product;
    size_t size = 0;
    if (a->transpose && a->digits > 0) {
        const size_t few = kernel_of(g, DECODE)->prepared_size(g->k), many = kernel_of(g, PREFILL)->prepared_size(g->k);
        size = !qz_is_few(g->kernels, g->total, a->digits) && many > few ? many : few;
    } else if (a->transpose) {
        size = g->kernels->plain.prepared_size(g->k, g->group_size);
    }
    g->in_place = a->transpose && a->digits > 0 && qz_last(&a->x) == g->k && a->x.type == QZ_F32 &&
                  qz_last_stride(&a->x) == 4 && qz_is_aligned(&a->x);
    g->staged = rounded(size);
    g->stride = g->staged + (g->in_place ? 0 : rounded((size_t)g->k * sizeof(float)) + 64);
    g->max_slots =
        g->stride && prepared_bytes / g->stride < MAX_SLOTS ? (ptrdiff_t)(prepared_bytes / g->stride) : MAX_SLOTS;
    if (g->max_slots < MIN_ROWS) g->max_slots = MIN_ROWS;
    if (g->max_slots > g->total) g->max_slots = g->total;
    g->max_segments = g->total < MAX_SEGMENTS ? g->total : MAX_SEGMENTS;
}

/* Sets tiles, and how many rows a segment has at most. */
static void share_out(gather *g) {
    const qz_matmul_args *a = g->product;
    const double pieces = 4.0 * (double)g->threads, runs = (double)g->runs;
    const int transpose = a->transpose, exact = a->digits > 0;
    g->tile = transpose ? QZ_PREFILL_ROWS : exact ? QZ_TILE_COLUMNS : QZ_FLOAT_OUTPUTS_N;
    _Static_assert((int)QZ_PREFILL_ROWS == (int)QZ_FLOAT_OUTPUTS, "one tile for both classes");
    while (!transpose && exact && g->tile > g->group_size && (double)(g->n / g->tile) * runs < pieces) g->tile /= 2;
    g->tiles = (g->n + g->tile - 1) / g->tile;
    g->most = transpose ? MAX_ROWS_T : exact ? MAX_ROWS_N : MAX_ROWS_FLOAT_N;
    if (g->threads > 1) {
        const double few = (double)g->tiles * (double)g->total / pieces;
        if (few < (double)g->most) g->most = few > MIN_ROWS ? (ptrdiff_t)few : MIN_ROWS;
    }
    const double long_enough = (exact ? longest : longest_float) / ((double)g->tile * (double)g->k + 1);
    if (long_enough < (double)g->most) g->most = long_enough > 1 ? (ptrdiff_t)long_enough : 1;
    if (g->most > g->max_slots) g->most = g->max_slots;
}

/* Brings the matrices of y into order. */
static qz_status take_order(gather *g, qz_arena *arena, const qz_run *run) {
    const size_t size = (size_t)g->args->count * sizeof(ptrdiff_t);
    const qz_run alone = {1, run->poll, run->poll_context};
    sorting s = {.keys = g->args->rhs, .sorted = 1};
    s.order = qz_arena_take(arena, size);
    s.other = qz_arena_take(arena, size);
    if (!s.order || !s.other) return QZ_NO_MEMORY;
    const qz_status status = sort(&s, g->args->count, &alone);
    g->order = s.order;
    g->runs = s.runs;
    return status;
}

/* All other scratch of a call, taken before anything is written. */
static int take_scratch(gather *g, qz_arena *arena) {
    const qz_matmul_args *a = g->product;
    const qz_array *w = &a->w;
    const ptrdiff_t count = g->args->count, matrices = qz_count(&a->x, a->x.ndim - 2);
    const int defined = a->transpose && a->digits > 0, apart = qz_words_are_apart(w);
    size_slots(g);
    g->x = qz_arena_take(arena, (size_t)g->max_slots * g->stride);
    g->slots = qz_arena_take(arena, (size_t)g->max_slots * sizeof *g->slots);
    g->segments = qz_arena_take(arena, (size_t)g->max_segments * sizeof *g->segments);
    if (matrices <= count) {
        g->places = qz_arena_take(arena, (size_t)matrices * sizeof *g->places);
        if (!g->places) return 0;
        memset(g->places, 0, (size_t)matrices * sizeof *g->places);
    }
    if (defined) {
        const qz_format_kernels *definition = qz_definition()->format(a->format, a->group_slot);
        g->record = qz_arena_take(arena, definition->decode_t[a->digits - 1].prepared_size(g->k));
    }
    if (apart) g->words = qz_arena_take(arena, (size_t)w->shape[w->ndim - 2] * (size_t)qz_last(w) * 4);
    return g->x && g->slots && g->segments && (g->record || !defined) && (g->words || !apart);
}

qz_status qz_cpu_gather(const qz_plan *plan, const qz_gather_args *args, const qz_run *run) {
    const qz_matmul_args *a = &args->product;
    gather g = {.plan = plan, .args = args, .product = a, .copied = -1};
    g.n = qz_padded_outputs(a);
    g.k = qz_padded_inputs(a);
    g.kernels = plan->kernels->format(a->format, a->group_slot);
    g.group_size = qz_formats[a->format].group_sizes[a->group_slot];
    g.m = a->x.shape[a->x.ndim - 2];
    g.threads = run->threads ? run->threads : qz_get_num_threads();
    g.total = args->count * g.m;
    if (g.total == 0 || g.n == 0) return QZ_OK;
    qz_arena arena;
    qz_arena_open(&arena);
    qz_status status = take_order(&g, &arena, run);
    if (status == QZ_OK && !take_scratch(&g, &arena)) status = QZ_NO_MEMORY;
    if (status == QZ_OK) share_out(&g);
    for (ptrdiff_t row = 0; row < g.total && status == QZ_OK;) {
        row = lay_out(&g, row);
        status = multiply_portion(&g, run);
    }
    qz_arena_release(&arena);
    return status;
}
