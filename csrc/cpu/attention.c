/* Loops and threads of attention over packed keys and values.
 *
 * The rows (queries) that share a head of the cache are taken in blocks, positions in chunks. A piece of work is a
 * chunk for a block of rows: an online softmax from nothing, tile by tile. What comes of the chunks is merged in rising
 * order afterwards, so that no result depends on who did what, nor on the rows that were done together. */
#include <math.h>
#include <string.h>

#include "../kernels/kv_tables.h"
#include "cpu.h"
#include "rows.h"
#include "scratch.h"
#include "threads.h"

/* Positions of a chunk; bytes that the results of all chunks of the rows under way should not exceed, if a block has
 * more rows than FEW; bytes of codes copied at a time where they do not follow each other. */
enum { CHUNK = 512, PARTIAL_BYTES = 16 << 20, FEW = 8, COPIED = 8192, TILE = QZ_ATTENTION_TILE };
_Static_assert(CHUNK % TILE == 0, "tiles do not cross chunks");

/* Elements of a block's rows that keep a piece of work short enough to look for signals after it. */
enum { LARGE = 1 << 15 };

/* Chunks that a thread takes at a time, at most, and how often each thread should take some. */
enum { NEIGHBOURS = 16, TURNS = 16 };

/* Floats of a row of queries or of accumulators: its blocks, each filled up to whole units. */
static ptrdiff_t pitch_of_block(const qz_kv_side *side) {
    return (side->codec.block + QZ_ATTENTION_UNIT - 1) / QZ_ATTENTION_UNIT * QZ_ATTENTION_UNIT;
}
static ptrdiff_t blocks_of(const qz_kv_side *side) { return side->codec.rotation.dimension / side->codec.block; }
static ptrdiff_t pitch_of_row(const qz_kv_side *side) { return blocks_of(side) * pitch_of_block(side); }

typedef struct tables {
    float centroids[256];
    uint8_t planes[4 * 256];
    int are_bfloat16;
} tables;

typedef struct attention {
    const qz_plan *plan;
    const qz_attention_args *args;
    const qz_attention_kernels *kernels;
    ptrdiff_t group, queries, rows; /* of a head of the cache: heads of q; times queries; rows in all */
    ptrdiff_t block_rows, blocks;   /* rows of a block, blocks of a head */
    ptrdiff_t span;                 /* chunks of a block at most */
    ptrdiff_t q_pitch, v_pitch;
    tables keys, values;
    ptrdiff_t first; /* of the blocks of all heads under way */
    float *q;        /* [blocks][rows][q_pitch] */
    float *sums;     /* [blocks][chunks][rows][v_pitch] */
    qz_softmax *softmax;
} attention;

/* The positions [low, high) that a row or several see, but for the mask. */
typedef struct range {
    ptrdiff_t low, high;
} range;

/* A block of rows. */
typedef struct block {
    ptrdiff_t place, head, first, count; /* among those under way; of the cache; rows of the head */
    range seen;                          /* by any of them */
} block;

/* Rows of a head go query by query, so that those of a block see nearly the same. */
static range seen_by(const attention *a, ptrdiff_t row) {
    const qz_attention_args *args = a->args;
    const ptrdiff_t own = args->is_causal ? args->length - a->queries + row / a->group : args->length - 1;
    range seen = {0, own + 1};
    if (args->has_window && own - args->window + 1 > 0) seen.low = own - args->window + 1;
    if (seen.high < seen.low) seen.high = seen.low;
    return seen;
}

static block block_at(const attention *a, ptrdiff_t index) {
    block b = {.place = index - a->first, .head = index / a->blocks};
    b.first = index % a->blocks * a->block_rows;
    b.count = a->rows - b.first < a->block_rows ? a->rows - b.first : a->block_rows;
    b.seen.low = seen_by(a, b.first).low; /* both rise with the row */
    b.seen.high = seen_by(a, b.first + b.count - 1).high;
    if (b.seen.high < b.seen.low) b.seen.high = b.seen.low;
    return b;
}

static ptrdiff_t first_chunk(const block *b) { return b->seen.low / CHUNK; }
static ptrdiff_t count_chunks(const block *b) {
    return b->seen.high > b->seen.low ? (b->seen.high - 1) / CHUNK - first_chunk(b) + 1 : 0;
}

/* Where row `row` of a head stands in q, y or the mask, whose first axes are heads and queries. */
static char *at_row(const attention *a, const qz_array *array, const block *b, ptrdiff_t row) {
    const ptrdiff_t head = b->head * a->group + row % a->group;
    return array->data + head * array->strides[0] + row / a->group * array->strides[1];
}

/* ---- rows of q ---- */

static void prepare_row(const attention *a, const block *b, ptrdiff_t i) {
    const qz_kernels *kernels = a->plan->kernels;
    const qz_kv_side *side = &a->args->keys;
    const qz_array *q = &a->args->q;
    const ptrdiff_t length = side->codec.block, pitch = pitch_of_block(side);
    float values[QZ_MAX_HEAD_DIM], *to = a->q + (b->place * a->block_rows + i) * a->q_pitch;
    kernels->load(values, at_row(a, q, b, b->first + i), qz_last_stride(q), q->type, side->codec.rotation.dimension);
    const qz_rotate_job job = {&side->codec.rotation, 0, values, values, 1, 0, 0};
    kernels->kv->rotate(&job);
    memset(to, 0, (size_t)a->q_pitch * sizeof *to);
    for (ptrdiff_t j = 0; j < side->codec.rotation.dimension; j++)
        to[j / length * pitch + qz_attention_place(j % length)] = values[j] * a->args->scale;
}

static void prepare_blocks(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const attention *a = context;
    for (ptrdiff_t index = begin; index < end; index++) {
        const block b = block_at(a, a->first + index);
        for (ptrdiff_t i = 0; i < b.count; i++) prepare_row(a, &b, i);
    }
}

/* ---- a tile ---- */

/* The scales of a block of elements at consecutive slots. Codec 1 has one norm from 1024 dimensions on, which stands
 * where the norms would be if they were one array [heads, capacity]. */
static void load_scales(const attention *a, const qz_kv_side *side, float *to, ptrdiff_t head, ptrdiff_t slot,
                        ptrdiff_t count, ptrdiff_t element_block) {
    const qz_array *norms = &side->norms;
    const ptrdiff_t *strides = norms->strides, *shape = norms->shape;
    if (side->norms_are_flat) {
        for (ptrdiff_t i = 0; i < count; i++) {
            const ptrdiff_t index = head * shape[1] + slot + i, row = index / shape[2];
            const char *from = norms->data + row / shape[1] * strides[0] + row % shape[1] * strides[1];
            a->plan->kernels->load(to + i, from + index % shape[2] * strides[2], strides[1], norms->type, 1);
        }
    } else {
        const char *from = norms->data + head * strides[0] + slot * strides[1] + element_block * strides[2];
        a->plan->kernels->load(to, from, strides[1], norms->type, count);
        from += count * strides[1]; /* of a tile to come: a line or two now and then, which hardware does not foresee */
        for (ptrdiff_t at = 0; at < count * strides[1]; at += 64) __builtin_prefetch(from + at);
    }
    if (side->norm_divisor != 1) {
        for (ptrdiff_t i = 0; i < count; i++) to[i] /= side->norm_divisor;
    }
    if (side->norm_factor != 1) {
        for (ptrdiff_t i = 0; i < count; i++) to[i] *= side->norm_factor;
    }
}

/* How a tile reaches score or weigh: positions [low, high), whose rows of floats begin at those of `low`. */
typedef struct tile {
    const block *block;
    const qz_kv_side *side;
    const tables *tables;
    float *floats; /* scores or weights of the tile */
    float *rows;   /* of q, or accumulators */
    ptrdiff_t pitch, base, low, high;
    int is_of_keys;
} tile;

/* Positions whose slots follow each other, and whose codes fit the copy if they need one. */
static ptrdiff_t run_length(const tile *t, ptrdiff_t position, ptrdiff_t slot, ptrdiff_t bytes) {
    ptrdiff_t count = t->high - position, most = t->side->codes.shape[1] - slot;
    if (qz_last_stride(&t->side->codes) != 1 && most > COPIED / bytes) most = COPIED / bytes;
    return count < most ? count : most;
}

static void do_run(const attention *a, const tile *t, ptrdiff_t position, ptrdiff_t slot, ptrdiff_t count,
                   ptrdiff_t element_block) {
    const qz_kv_side *side = t->side;
    const qz_array *codes = &side->codes;
    const ptrdiff_t bytes = side->codec.block * side->codec.stored_bits / 8, last = qz_last_stride(codes);
    const ptrdiff_t offset = position - t->base;
    const char *from = codes->data + t->block->head * codes->strides[0] + slot * codes->strides[1];
    float scales[TILE];
    uint8_t copy[COPIED];
    qz_kv_block k = {.stride = codes->strides[1],
                     .positions = count,
                     .length = side->codec.block,
                     .bits = side->codec.bits,
                     .in_bytes = side->codec.stored_bits == 8,
                     .is_bfloat16 = t->tables->are_bfloat16,
                     .centroids = t->tables->centroids,
                     .planes = t->tables->planes,
                     .scales = scales};
    from += element_block * bytes * last;
    k.codes = (const uint8_t *)from;
    if (last != 1) {
        for (ptrdiff_t i = 0; i < count; i++)
            qz_copy_bytes((char *)copy + i * bytes, 1, from + i * codes->strides[1], last, bytes);
        k.codes = copy;
        k.stride = bytes;
    }
    load_scales(a, side, scales, t->block->head, slot, count, element_block);
    for (ptrdiff_t i = count; i < TILE; i++) scales[i] = 0;
    const qz_kv_rows rows = {t->rows + element_block * pitch_of_block(side), t->pitch, t->block->count};
    if (t->is_of_keys) {
        a->kernels->score(&k, &rows, t->floats + offset);
    } else {
        a->kernels->weigh(&k, &rows, t->floats + offset);
    }
}

static void do_tile(const attention *a, const tile *t) {
    const qz_kv_side *side = t->side;
    const ptrdiff_t capacity = side->codes.shape[1], start = a->args->start;
    const ptrdiff_t bytes = side->codec.block * side->codec.stored_bits / 8;
    for (ptrdiff_t position = t->low, count; position < t->high; position += count) {
        const ptrdiff_t slot = position < capacity - start ? start + position : position - (capacity - start);
        count = run_length(t, position, slot, bytes);
        for (ptrdiff_t i = 0; i < blocks_of(side); i++) do_run(a, t, position, slot, count, i);
    }
}

/* ---- masks ---- */

/* Scores of what the row does not see become minus infinity. */
static void mask_row(const attention *a, const block *b, ptrdiff_t row, float *scores, ptrdiff_t base, range in) {
    const qz_array *mask = &a->args->mask;
    const range seen = seen_by(a, row);
    const ptrdiff_t low = seen.low > in.low ? seen.low : in.low, high = seen.high < in.high ? seen.high : in.high;
    if (a->args->mask_kind != QZ_MASK_NONE && low < high) {
        const ptrdiff_t stride = mask->strides[2], count = high - low;
        const char *from = at_row(a, mask, b, row) + low * stride;
        float *to = scores + (low - base), added[TILE];
        if (a->args->mask_kind == QZ_MASK_FLOAT) {
            a->plan->kernels->load(added, from, stride, mask->type, count);
            for (ptrdiff_t i = 0; i < count; i++) to[i] += added[i];
        } else {
            for (ptrdiff_t i = 0; i < count; i++) to[i] = from[i * stride] ? to[i] : -INFINITY;
        }
    }
    for (ptrdiff_t i = 0; i < TILE && (i < low - base || low >= high); i++) scores[i] = -INFINITY;
    for (ptrdiff_t i = high > base ? high - base : 0; i < TILE; i++) scores[i] = -INFINITY;
}

/* ---- chunks ---- */

static void attend_tile(const attention *a, const block *b, ptrdiff_t base, qz_softmax *softmax, float *sums) {
    _Alignas(64) float scores[(QZ_ATTENTION_ROWS + 1) * TILE]; /* one row more, since runs begin anywhere */
    const range in = {b->seen.low > base ? b->seen.low : base, b->seen.high < base + TILE ? b->seen.high : base + TILE};
    tile t = {b,          &a->args->keys, &a->keys, scores,  a->q + b->place * a->block_rows * a->q_pitch,
              a->q_pitch, base,           in.low,   in.high, 1};
    memset(scores, 0, (size_t)((b->count + 1) * TILE) * sizeof *scores);
    do_tile(a, &t);
    for (ptrdiff_t i = 0; i < b->count; i++) {
        float *row = scores + i * TILE;
        if (a->args->softcap > 0) a->kernels->cap(row, a->args->softcap);
        mask_row(a, b, b->first + i, row, base, in);
        a->kernels->soften(row, &softmax[i]);
        if (softmax[i].factor != 1) a->kernels->rescale(sums + i * a->v_pitch, a->v_pitch, softmax[i].factor);
    }
    t.side = &a->args->values;
    t.tables = &a->values;
    t.rows = sums;
    t.pitch = a->v_pitch;
    t.is_of_keys = 0;
    do_tile(a, &t);
}

static ptrdiff_t place_of_chunk(const attention *a, const block *b, ptrdiff_t chunk) {
    return (b->place * a->span + chunk) * a->block_rows;
}

static void attend_chunks(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const attention *a = context;
    for (ptrdiff_t piece = begin; piece < end; piece++) {
        const block b = block_at(a, a->first + piece / a->span);
        const ptrdiff_t chunk = piece % a->span, place = place_of_chunk(a, &b, chunk);
        if (chunk >= count_chunks(&b)) continue;
        const ptrdiff_t start = (first_chunk(&b) + chunk) * CHUNK;
        const ptrdiff_t low = b.seen.low > start ? b.seen.low / TILE * TILE : start;
        const ptrdiff_t high = b.seen.high < start + CHUNK ? b.seen.high : start + CHUNK;
        qz_softmax softmax[QZ_ATTENTION_ROWS]; /* here, since each tile writes it: a line may hold several chunks' */
        float *sums = a->sums + place * a->v_pitch;
        for (ptrdiff_t i = 0; i < b.count; i++) softmax[i] = (qz_softmax){-INFINITY, 0, 1};
        memset(sums, 0, (size_t)(b.count * a->v_pitch) * sizeof *sums);
        for (ptrdiff_t base = low; base < high; base += TILE) attend_tile(a, &b, base, softmax, sums);
        memcpy(a->softmax + place, softmax, (size_t)b.count * sizeof *softmax);
    }
}

/* ---- results ---- */

/* Bits that do not depend on the machine: NaN is one NaN, and zero has no sign. */
static void store_row(const attention *a, const block *b, ptrdiff_t row, float *values) {
    const qz_array *y = &a->args->y;
    const ptrdiff_t count = a->args->values.codec.rotation.dimension;
    for (ptrdiff_t i = 0; i < count; i++) values[i] = values[i] == values[i] ? values[i] + 0.0f : NAN;
    a->plan->kernels->store(at_row(a, y, b, row), qz_last_stride(y), y->type, values, count);
}

static void finish_row(const attention *a, const block *b, ptrdiff_t i) {
    const qz_kv_side *side = &a->args->values;
    const ptrdiff_t length = side->codec.block, pitch = pitch_of_block(side), chunks = count_chunks(b);
    const ptrdiff_t place = place_of_chunk(a, b, 0) + i;
    qz_softmax *softmax = a->softmax + place;
    float values[QZ_MAX_HEAD_DIM], *sums = a->sums + place * a->v_pitch;
    for (ptrdiff_t chunk = 1; chunk < chunks; chunk++) {
        const ptrdiff_t later = place + chunk * a->block_rows;
        a->kernels->merge(softmax, sums, a->softmax + later, a->sums + later * a->v_pitch, a->v_pitch);
    }
    if (chunks > 0 && softmax->sum != 0) {
        const float factor = 1.0f / softmax->sum;
        const qz_rotate_job job = {&side->codec.rotation, 1, values, values, 1, 0, 0};
        for (ptrdiff_t j = 0; j < side->codec.rotation.dimension; j++)
            values[j] = sums[j / length * pitch + qz_attention_place(j % length)] * factor;
        a->plan->kernels->kv->rotate(&job);
    } else {
        memset(values, 0, (size_t)side->codec.rotation.dimension * sizeof *values);
    }
    store_row(a, b, b->first + i, values);
}

static void finish_blocks(void *context, ptrdiff_t begin, ptrdiff_t end) {
    const attention *a = context;
    for (ptrdiff_t index = begin; index < end; index++) {
        const block b = block_at(a, a->first + index);
        for (ptrdiff_t i = 0; i < b.count; i++) finish_row(a, &b, i);
    }
}

/* ---- the call ---- */

static const float *values_of(const qz_kv_side *side) {
    switch (side->codec.bits) {
    case 2: return qz_kv_values_2;
    case 3: return qz_kv_values_3;
    case 4: return side->codec.version == 1 ? qz_kv_values_4_unrounded : qz_kv_values_4;
    case 5: return side->codec.version == 1 ? qz_kv_values_5_early : qz_kv_values_5;
    case 6: return side->codec.version == 1 ? qz_kv_values_6_early : qz_kv_values_6;
    default: return side->codec.version == 1 ? qz_kv_values_8_early : qz_kv_values_8;
    }
}

static void fill_tables(tables *to, const qz_kv_side *side) {
    for (int i = 0; i < 256; i++) to->centroids[i] = values_of(side)[i & ((1 << side->codec.bits) - 1)];
    to->are_bfloat16 = side->codec.bits < 8;
    for (int i = 0; i < (side->codec.stored_bits == 8 ? 256 : 64); i++) { /* of so many codes at most */
        uint32_t bits;
        memcpy(&bits, &to->centroids[i], sizeof bits);
        for (int byte = 0; byte < 4; byte++)
            to->planes[i / 64 * 256 + 64 * byte + i % 64] = (uint8_t)(bits >> 8 * byte);
        to->are_bfloat16 = to->are_bfloat16 && (bits & 0xffff) == 0;
    }
}

/* Bytes of so many floats. That of a block's partial results fits: for a byte of codes, of which there are less than
 * 2^53 (qz_checked_count), they have at most 32 floats (8 codes of 2 bits, filled up to 64) times 32 rows / CHUNK. */
static size_t bytes_of_floats(ptrdiff_t rows, ptrdiff_t length) {
    return (size_t)rows * (size_t)length * sizeof(float);
}

/* How many rows make a block, and the most chunks of one. Rows of one head share what they decode: as many as the
 * kernels take, unless they are long, or the results of their chunks would take too much memory. */
static void cut(attention *a) {
    const ptrdiff_t most = (a->args->length + CHUNK - 1) / CHUNK;
    ptrdiff_t span = most;
    if (a->args->has_window) { /* a block's queries see a window and what is between */
        const ptrdiff_t seen = a->args->window + (a->args->is_causal ? QZ_ATTENTION_ROWS : 0);
        span = seen / CHUNK + 2 < most ? seen / CHUNK + 2 : most;
    }
    ptrdiff_t rows = a->rows < QZ_ATTENTION_ROWS ? a->rows : QZ_ATTENTION_ROWS;
    const ptrdiff_t size = a->q_pitch + a->v_pitch;
    while (rows > FEW && (bytes_of_floats(rows * span, a->v_pitch) > PARTIAL_BYTES || rows * size > LARGE)) {
        rows = (rows + 1) / 2;
    }
    a->block_rows = rows;
    a->blocks = (a->rows + rows - 1) / rows;
    a->span = span;
}

/* Neighbours, since kernels ask for the codes that follow theirs: a thread that takes others waits for their first
 * codes. As many as are short enough, to look codes up taking as long as FEW rows do, and leave no thread much to wait
 * for. */
static ptrdiff_t chunks_at_a_time(const attention *a, ptrdiff_t chunks, const qz_run *run) {
    const ptrdiff_t threads = run->threads > 0 ? run->threads : qz_get_num_threads();
    const ptrdiff_t rows = a->block_rows > FEW ? a->block_rows : FEW;
    const ptrdiff_t of_one = chunks / threads / TURNS, some = LARGE / (rows * (a->q_pitch + a->v_pitch));
    const ptrdiff_t most = some < NEIGHBOURS ? some : NEIGHBOURS, taken = of_one < most ? of_one : most;
    return taken > 1 ? taken : 1;
}

static int take_scratch(attention *a, qz_arena *arena, ptrdiff_t together) {
    const ptrdiff_t rows = together * a->block_rows, partial = rows * a->span;
    a->q = qz_arena_take(arena, bytes_of_floats(rows, a->q_pitch));
    a->sums = qz_arena_take(arena, bytes_of_floats(partial, a->v_pitch));
    a->softmax = qz_arena_take(arena, (size_t)partial * sizeof *a->softmax);
    return a->q && a->sums && a->softmax;
}

static qz_status attend(attention *a, const qz_run *run) {
    const ptrdiff_t all = a->args->keys.codes.shape[0] * a->blocks;
    const size_t of_sums = bytes_of_floats(a->block_rows * a->span, a->v_pitch);
    const size_t of_q = bytes_of_floats(a->block_rows, a->q_pitch);
    ptrdiff_t together = of_sums < PARTIAL_BYTES ? (ptrdiff_t)(PARTIAL_BYTES / (of_sums + of_q + 1)) : 1;
    if (together > all) together = all;
    if (together < 1) together = 1;
    qz_arena arena;
    qz_arena_open(&arena);
    qz_status status = take_scratch(a, &arena, together) ? QZ_OK : QZ_NO_MEMORY;
    for (a->first = 0; a->first < all && status == QZ_OK; a->first += together) {
        const ptrdiff_t count = all - a->first < together ? all - a->first : together;
        status = qz_parallel(prepare_blocks, a, count, 1, run);
        const ptrdiff_t chunks = count * a->span, grain = chunks_at_a_time(a, chunks, run);
        if (status == QZ_OK) status = qz_parallel(attend_chunks, a, chunks, grain, run);
        if (status == QZ_OK) status = qz_parallel(finish_blocks, a, count, 1, run);
    }
    qz_arena_release(&arena);
    return status;
}

qz_status qz_cpu_attention(const qz_plan *plan, const qz_attention_args *args, const qz_run *run) {
    const ptrdiff_t heads = args->keys.codes.shape[0];
    if (heads == 0 || args->q.shape[0] == 0 || args->q.shape[1] == 0) return QZ_OK;
    attention a = {.plan = plan, .args = args, .kernels = &plan->kernels->kv->attention};
    a.group = args->q.shape[0] / heads;
    a.queries = args->q.shape[1];
    a.rows = a.group * a.queries;
    a.q_pitch = pitch_of_row(&args->keys);
    a.v_pitch = pitch_of_row(&args->values);
    fill_tables(&a.keys, &args->keys);
    fill_tables(&a.values, &args->values);
    cut(&a);
    return attend(&a, run);
}
