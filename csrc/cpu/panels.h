// The operands of the products are packed as panels of 32 rows (or columns). A panel is a run of steps along the depth of the
// product, and a step is two tiles of 16 x 16 words. A word is what a lane multiplies at once: two neighbouring bf16 along the
// depth where the instruction set multiplies bf16, else one fp32. Row 16h + i of a left panel and word w of a step lie at
// [step][h][i][w], column 16h + j of a right panel at [step][h][w][j]: tiles of AMX as they are, and vectors of right operands and
// broadcasts of left ones for the others, or lanes of them, or two zips away (NEON).
//
// A panel holds zeros beyond the edges of the matrix.
//
// Included inside the namespace of an instruction set, see isa.h.
using Word = std::uint32_t;
constexpr std::int64_t panel = 32, tile = 16, tile_words = tile * tile, step_words = 2 * tile_words;
constexpr std::int64_t word_depth = Block::multiplies_bf16 ? 2 : 1;  // elements of a word along the depth
constexpr std::int64_t step_depth = tile * word_depth;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t steps_of(std::int64_t depth) { return ceil_div(depth, step_depth); }
inline std::int64_t panel_words(std::int64_t depth) { return steps_of(depth) * step_words; }

inline Word as_fp32(std::uint16_t bf16) { return Word(bf16) << 16; }

// Writes a row of a tile of fp32, of which `there` elements are there.
inline void widen(const std::uint16_t* from, std::int64_t there, Dtype dtype, Word* to) {
  std::uint16_t some[tile] = {};
  if (there < tile) {
    std::memcpy(some, from, there * sizeof(*from));
    from = some;
  }
  for (std::int64_t k = 0; k < tile; k += lanes) {
    const Halves bits = load_as<Halves>(from + k);
    store_as(to + k, (dtype == Dtype::fp16 ? from_fp16(bits) : from_bf16(bits)).v);
  }
}

// Transposes 16 x 16 words.
inline void transpose(const Word* from, Word* to) {
#if defined(__AVX512F__)
  __m512i r[16], s[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + 16 * i);
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    s[i] = _mm512_unpacklo_epi64(a, c), s[i + 1] = _mm512_unpackhi_epi64(a, c);
    s[i + 2] = _mm512_unpacklo_epi64(b, d), s[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // s[4g + j] holds, in its quarter q, column 4q + j of rows 4g to 4g + 3.
  for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_shuffle_i32x4(s[j], s[4 + j], 0x88), b = _mm512_shuffle_i32x4(s[j], s[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(s[8 + j], s[12 + j], 0x88), d = _mm512_shuffle_i32x4(s[8 + j], s[12 + j], 0xdd);
    _mm512_storeu_si512(to + 16 * j, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(to + 16 * (4 + j), _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(to + 16 * (8 + j), _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(to + 16 * (12 + j), _mm512_shuffle_i32x4(b, d, 0xdd));
  }
#elif defined(BUPO_NEON)
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 16; j += 4) {
      uint32x4_t r[4];
      for (int k = 0; k < 4; k++) r[k] = load_as<uint32x4_t>(from + 16 * (i + k) + j);
      const uint32x4_t a = vzip1q_u32(r[0], r[2]), b = vzip1q_u32(r[1], r[3]);
      const uint32x4_t c = vzip2q_u32(r[0], r[2]), d = vzip2q_u32(r[1], r[3]);
      store_as(to + 16 * j + i, vzip1q_u32(a, b)), store_as(to + 16 * (j + 1) + i, vzip2q_u32(a, b));
      store_as(to + 16 * (j + 2) + i, vzip1q_u32(c, d)), store_as(to + 16 * (j + 3) + i, vzip2q_u32(c, d));
    }
#else
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to[16 * j + i] = from[16 * i + j];
#endif
}

// Writes a tile [row][word] of 16 rows of a matrix whose rows run along the depth; `rows` and `depth` are what is there.
inline void rows_to_tile(const std::uint16_t* from, std::int64_t stride, Dtype dtype, std::int64_t rows, std::int64_t depth,
                         Word* to) {
  const std::int64_t there = min(depth, step_depth);
  if (rows < tile || there < step_depth) std::memset(to, 0, tile_words * sizeof(Word));
  for (std::int64_t i = 0; i < min(rows, tile); i++) {
    const std::uint16_t* row = from + i * stride;
    if constexpr (word_depth == 2) {
      // A whole tile row is one copy of known size.
      there == step_depth ? std::memcpy(to + i * tile, row, 64) : std::memcpy(to + i * tile, row, there * 2);
    } else {
      widen(row, there, dtype, to + i * tile);
    }
  }
}

// Writes a tile [word][column] of 16 columns of a matrix whose columns run along the depth: element k of column j is
// from[k · stride + j].
inline void columns_to_tile(const std::uint16_t* from, std::int64_t stride, Dtype dtype, std::int64_t depth, std::int64_t columns,
                            Word* to) {
  const std::int64_t there = min(columns, tile);
  if (columns < tile || depth < step_depth) std::memset(to, 0, tile_words * sizeof(Word));
  for (std::int64_t w = 0; w < tile && w * word_depth < depth; w++) {
    const std::uint16_t* row = from + w * word_depth * stride;
    if constexpr (word_depth == 2) {
      const bool both = w * word_depth + 1 < depth;
      for (std::int64_t j = 0; j < there; j++) to[w * tile + j] = row[j] | (both ? as_fp32(row[stride + j]) : 0);
    } else {
      widen(row, there, dtype, to + w * tile);
    }
  }
}

enum class Side { left, right };

// Packs panels of either side, from a matrix with its depth along the rows (`from[i · stride + k]`, i being the panels' own index)
// or across them (`from[k · stride + i]`), and zeros from `depth` to `padded_depth`. What lies side by side in memory is read
// together.
template <Side side, bool depth_along_rows>
inline void pack_panels(const std::uint16_t* from, std::int64_t stride, Dtype dtype, std::int64_t count, std::int64_t depth,
                        std::int64_t padded_depth, Word* to) {
  alignas(64) Word turned[tile_words];
  const std::int64_t words = panel_words(padded_depth), steps = steps_of(padded_depth), panels = ceil_div(count, panel);
  for (std::int64_t i = 0; i < panels * steps; i++) {
    const std::int64_t p = depth_along_rows ? i / steps : i % panels, step = depth_along_rows ? i % steps : i / panels;
    const std::int64_t k = step * step_depth, left_over = max<std::int64_t>(depth - k, 0);
    for (std::int64_t half = 0; half < 2; half++) {
      const std::int64_t first = p * panel + half * tile, there = max<std::int64_t>(count - first, 0);
      Word* final = to + p * words + step * step_words + half * tile_words;
      constexpr bool as_is = (side == Side::left) == depth_along_rows;
      Word* packed = as_is ? final : turned;
      if constexpr (depth_along_rows)
        rows_to_tile(from + first * stride + k, stride, dtype, there, left_over, packed);
      else
        columns_to_tile(from + k * stride + first, stride, dtype, left_over, there, packed);
      if constexpr (!as_is) transpose(turned, final);
    }
  }
}
