/* x as digit planes, the form in which the vector kernels of the exact class read it.
 *
 * The kernels take codes in steps: of as many vectors as are unpacked together (unpack_folded), or of as many such
 * as fill a block. A prepared row holds, for every step and digit, lowest first, the digits in the order
 * of the step's codes; then the numbers of the blocks. It has room for a multiple of QZ_LANES blocks, which are whole
 * steps: the last step may reach beyond k, where digits are zero and sums are left alone. */

#define QZ_VECTOR_BYTES (4 * QZ_LANES)

/* Codes of a step, and its vectors of codes. */
#define QZ_CODES_FOLDED(bits) (QZ_FOLD(QZ_STORED_BITS(bits)) * QZ_VECTOR_BYTES)
#define QZ_STEP(bits, block) (QZ_CODES_FOLDED(bits) > (block) ? QZ_CODES_FOLDED(bits) : (block))
#define QZ_UNITS(bits, block) (QZ_STEP(bits, block) / QZ_VECTOR_BYTES)
enum { QZ_MAX_UNITS = 4 };

/* Of QZ_LANES blocks, side by side, so that one pointer serves all that is loaded of them. */
typedef struct chunk_numbers {
    float scale[QZ_LANES];         /* 2^e */
    float sum[QZ_LANES];           /* S = sum of v, as float */
    int32_t offset[QZ_LANES];      /* by what the dot of stored codes exceeds that of centred ones: (c - zero) * S */
    int32_t offset_high[QZ_LANES]; /* wide formats: the share of the top digits in it, and offset holds the rest */
} chunk_numbers;

typedef struct planes {
    int8_t *digits;
    chunk_numbers *numbers;
} planes;

QZ_INLINE ptrdiff_t padded_blocks(ptrdiff_t k, int block) { return (k / block + QZ_LANES - 1) / QZ_LANES * QZ_LANES; }

QZ_INLINE size_t planes_size(ptrdiff_t k, int block, int digits) {
    size_t blocks = (size_t)padded_blocks(k, block);
    return (blocks * (size_t)(block * digits) + blocks / QZ_LANES * sizeof(chunk_numbers) + 63) / 64 * 64;
}

QZ_INLINE planes planes_at(const char *prepared, ptrdiff_t k, int block, int digits) {
    ptrdiff_t blocks = padded_blocks(k, block);
    return (planes){(int8_t *)prepared, (chunk_numbers *)(prepared + blocks * block * digits)};
}

/* The numbers in which a block's stand, in lane lane_of(block). */
QZ_INLINE chunk_numbers *numbers_at(const planes *p, ptrdiff_t block) { return p->numbers + (size_t)block / QZ_LANES; }
QZ_INLINE int lane_of(ptrdiff_t block) { return (int)((size_t)block % QZ_LANES); }

QZ_INLINE void set_numbers(const planes *p, ptrdiff_t block, float scale, int32_t sum, int32_t offset,
                           int32_t offset_high) {
    chunk_numbers *numbers = numbers_at(p, block);
    const int lane = lane_of(block);
    numbers->scale[lane] = scale;
    numbers->sum[lane] = (float)sum;
    numbers->offset[lane] = offset;
    numbers->offset_high[lane] = offset_high;
}

/* Codes as they multiply: FP4's are looked up. */
static const uint8_t shifted_fp4[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};
QZ_INLINE v_u8 as_multiplied(v_u8 codes, int bits) { return bits == QZ_FP4 ? look_up_u8(shifted_fp4, codes) : codes; }

/* nvfp4 keeps what it has for each block in loose order (simd/dot.h). */
#define QZ_IS_NVFP4(bits, block) ((bits) == QZ_FP4 && (block) < 32)
#define QZ_BLOCK_PLACE(i, bits, block) (QZ_IS_NVFP4(bits, block) ? QZ_LOOSE_PLACE(i) : (i))

/* Where strips hold block b. Whole panels of nvfp4 are held chain after chain: tiles then read x from one end to the
 * other, which is what processors fetch ahead. */
QZ_INLINE ptrdiff_t strip_place(ptrdiff_t b, ptrdiff_t blocks, int bits, int block) {
    const ptrdiff_t i = (ptrdiff_t)((size_t)b % QZ_NVFP4_PANEL), panel = b - i;
    if (!QZ_IS_NVFP4(bits, block) || blocks - panel < QZ_NVFP4_PANEL) return b;
    return panel + i % QZ_NVFP4_CHAINS * (QZ_NVFP4_PANEL / QZ_NVFP4_CHAINS) + i / QZ_NVFP4_CHAINS;
}

/* The numbers of E4M3 that are nvfp4's scales come divided by 256 (f32_from_e4m3): 2^e makes up for it, but where p =
 * 7, since 2^e may then be as much as 2^122. */
#define QZ_GREATER_NVFP4 256.0f

/* What 2^e is multiplied with. */
QZ_INLINE float unit_of(int bits, int block, int digits) {
    return QZ_IS_NVFP4(bits, block) && digits > 1 ? QZ_UNIT(bits) * QZ_GREATER_NVFP4 : QZ_UNIT(bits);
}

/* unpack_folded and unpack_in_order of such. Groups of 16 may end within the 32 codes that the latter reads. */
QZ_INLINE void unpack_codes(v_u8 *codes, const uint8_t *packed, int bits) {
    const int fold = QZ_FOLD(QZ_STORED_BITS(bits));
#ifdef QZ_LOOKS_UP_FOLDED
    if (bits == QZ_FP4) {
        look_up_folded(codes, packed, shifted_fp4);
        return;
    }
#endif
    unpack_folded(codes, packed, QZ_STORED_BITS(bits));
    QZ_UNROLL
    for (int f = 0; f < fold; f++) codes[f] = as_multiplied(codes[f], bits);
}

QZ_INLINE v_u8 unpack_line(const uint8_t *packed, int bits, ptrdiff_t count) {
    uint8_t copy[QZ_VECTOR_BYTES / 2] = {0};
    if (bits == QZ_FP4 && count < QZ_VECTOR_BYTES && count % 32 != 0) {
        for (ptrdiff_t i = 0; i < count; i += 16) memcpy(copy + i / 2, packed + i / 2, 8);
        packed = copy;
        count = QZ_VECTOR_BYTES;
    }
    return as_multiplied(unpack_in_order(packed, QZ_STORED_BITS(bits), count), bits);
}

/* v from x, both of `count` elements, a multiple of QZ_LANES. Returns whether all of x is finite. */
QZ_INLINE int fixed_point(int32_t *v, const float *x, int count, int p, float *scale) {
    v_i32 most = set1_i32(0);
    int32_t mosts[QZ_LANES];
    for (int i = 0; i < count; i += QZ_LANES) {
        most = max_i32(most, and_i32(bits_of_f32(load_f32(x + i)), set1_i32(0x7fffffff)));
    }
    store_i32(mosts, most);
    for (int i = 1; i < QZ_LANES; i++) mosts[0] = mosts[i] > mosts[0] ? mosts[i] : mosts[0];
    int exponent = fixed_point_exponent((uint32_t)mosts[0], p);
    if (!is_finite_magnitude((uint32_t)mosts[0])) return 0;
    *scale = power_of_two(exponent);
    v_f32 inverse = set1_f32(power_of_two(-exponent));
    for (int i = 0; i < count; i += QZ_LANES) {
        store_i32(v + i, i32_from_f32_nearest(mul_f32(load_f32(x + i), inverse)));
    }
    return 1;
}

/* max_i32 of each of QZ_LANES vectors. */
QZ_INLINE v_i32 greatest_i32(v_f32 v[QZ_LANES]) {
    transpose_f32(v);
    v_i32 most = bits_of_f32(v[0]);
    QZ_UNROLL
    for (int i = 1; i < QZ_LANES; i++) most = max_i32(most, bits_of_f32(v[i]));
    return most;
}

/* fixed_point_exponent of each lane: 2^e and 2^-e. */
QZ_INLINE v_f32 powers_of_two(float scale[QZ_LANES], float inverse[QZ_LANES], v_i32 largest, int p) {
    const v_i32 field = shr_u32(add_i32(largest, set1_i32((int32_t)fixed_point_carry(p))), 23);
    const v_i32 biased = max_i32(sub_i32(field, set1_i32(p - 1)), set1_i32(1));
    const v_f32 power = f32_of_bits(shl_i32(biased, 23));
    store_f32(scale, power);
    store_f32(inverse, f32_of_bits(shl_i32(sub_i32(set1_i32(254), biased), 23)));
    return power;
}

QZ_INLINE v_i32 magnitude_f32(v_f32 v) { return and_i32(bits_of_f32(v), set1_i32(0x7fffffff)); }

/* Digit d of v is byte d of (v + 0x808080) ^ 0x808080: adding 128 at every place turns the balanced digits into plain
 * bytes, and the exclusive or takes the 128 away again. The address of digit 0 of element k is at; that of digit d is
 * d * step further. store_some_digits stores those of a vector, and returns `tops` plus the top digits,
 * v + 0x8080 >> 16. */
QZ_INLINE v_i32 store_some_digits(int8_t *at, ptrdiff_t step, v_i32 v, int digits, v_i32 tops) {
    const v_i32 bias = set1_i32(0x808080 & ((1 << 8 * digits) - 1));
    v_i32 biased = add_i32(v, bias);
    uint8_t *to = (uint8_t *)at;
    if (digits == 3) tops = add_i32(tops, sub_i32(shr_u32(biased, 16), set1_i32(128)));
    biased = xor_i32(biased, bias);
    store_low_u8(to, biased);
    if (digits > 1) store_low_u8(to + step, shr_u32(biased, 8));
    if (digits > 2) store_low_u8(to + 2 * step, shr_u32(biased, 16));
    return tops;
}

/* Returns sum(v) and leaves the sum of the top digits in *high. */
QZ_INLINE int32_t store_digits(int8_t *at, ptrdiff_t step, const int32_t *v, int count, int digits, int32_t *high) {
    v_i32 sum = set1_i32(0), highs = set1_i32(0);
    int32_t sums[QZ_LANES], tops[QZ_LANES];
    for (int i = 0; i < count; i += QZ_LANES) {
        const v_i32 element = load_i32(v + i);
        sum = add_i32(sum, element);
        highs = store_some_digits(at + i, step, element, digits, highs);
    }
    store_i32(sums, sum);
    store_i32(tops, highs);
    for (int i = 1; i < QZ_LANES; i++) {
        sums[0] += sums[i];
        tops[0] += tops[i];
    }
    *high = tops[0];
    return sums[0];
}

/* Multiplication in uint32: c * S may pass 2^31, and only the remainder modulo 2^32 counts. */
QZ_INLINE void set_offsets(int32_t *offset, int32_t *offset_high, int32_t sum, int32_t high, int bits, int wide) {
    uint32_t centre = (uint32_t)(QZ_CENTRE(bits) - QZ_DOT_ZERO(bits));
    uint32_t top = wide ? (uint32_t)high : 0;
    *offset = (int32_t)(centre * ((uint32_t)sum - 65536u * top));
    *offset_high = (int32_t)(centre * top);
}

/* `count` bytes of codes' order to that of unpack_folded. */
QZ_INLINE void fold_bytes(int8_t *to, const int8_t *from, int count, int fold, int run) {
    for (int i = 0; i < count; i += fold * QZ_VECTOR_BYTES) {
        for (int j = 0; j < QZ_VECTOR_BYTES; j++) {
            for (int f = 0; f < fold; f++) {
                to[i + f * QZ_VECTOR_BYTES + j] = from[i + (j / run * fold + f) * run + j % run];
            }
        }
    }
}

/* What fills the last chunk of a row: steps of zeros, and a scale that leaves sums as they are. */
QZ_INLINE void clear_blocks_beyond(planes *to, ptrdiff_t k, int block, int digits) {
    const ptrdiff_t step = QZ_STEP(QZ_FP4, block), blocks = k / block, all = padded_blocks(k, block);
    const ptrdiff_t filled = (k + step - 1) / step * step;
    memset(to->digits + filled * digits, 0, (size_t)((all * block - filled) * digits));
    for (ptrdiff_t b = blocks; b < all; b++) set_numbers(to, QZ_BLOCK_PLACE(b, QZ_FP4, block), 0.0f, 0, 0, 0);
}

QZ_INLINE int prepare_planes(char *prepared, const float *x, ptrdiff_t k, int bits, int block, int digits) {
    const int p = fixed_point_bits(bits, block, digits), wide = is_wide(bits, block, digits);
    const int step = QZ_STEP(bits, block), fold = QZ_FOLD(QZ_STORED_BITS(bits)),
              run = QZ_FOLD_RUN(QZ_STORED_BITS(bits));
    const float unit = unit_of(bits, block, digits);
    planes to = planes_at(prepared, k, block, digits);
    for (ptrdiff_t begin = 0; begin < k; begin += step) {
        int8_t ordered[QZ_MAX_DIGITS][4 * QZ_VECTOR_BYTES < QZ_MAX_BLOCK ? QZ_MAX_BLOCK : 4 * QZ_VECTOR_BYTES];
        if (k - begin < step) memset(ordered, 0, sizeof ordered);
        for (ptrdiff_t at = begin; at < k && at < begin + step; at += block) {
            int32_t v[QZ_MAX_BLOCK], high, offset, offset_high;
            float scale;
            if (!fixed_point(v, x + at, block, p, &scale)) return 0;
            int32_t sum = store_digits(ordered[0] + (at - begin), sizeof ordered[0], v, block, digits, &high);
            set_offsets(&offset, &offset_high, sum, high, bits, wide);
            set_numbers(&to, QZ_BLOCK_PLACE(at / block, bits, block), scale * unit, sum, offset, offset_high);
        }
        for (int d = 0; d < digits; d++) {
            fold_bytes(to.digits + begin * digits + d * step, ordered[d], step, fold, run);
        }
    }
    if (bits == QZ_FP4) clear_blocks_beyond(&to, k, block, digits);
    return 1;
}
