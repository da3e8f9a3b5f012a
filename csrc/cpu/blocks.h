// The product C[32 x 32] = A · B of a left and a right panel with fp32 accumulators, in the instructions of one set.
//
// A tile unit multiplies whole panels (`multiply`), and meanwhile the vector units are free for the block before: `between(step)` is
// called in every step. Where there is no tile unit, `interleaves` is false, and panels are multiplied a part of their depth at a
// time (`multiply_part`): C is written for the `first` of them, and goes on with what is there for the others.
//
// Included inside the namespace of an instruction set, see isa.h.
#if defined(__AMX_BF16__)

struct Block {
  static constexpr bool multiplies_bf16 = true, interleaves = true;

  struct Session {  // the tile registers of this thread: eight, of 16 rows of 64 bytes
    Session() {
      struct alignas(64) Shape {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      };
      static constexpr Shape shape{};  // static: the instruction does not tell GCC that it reads all of it
      _tile_loadconfig(&shape);
    }
    ~Session() { _tile_release(); }
  };

  // Multiplies two tiles of A by two of B: four loads feed four products, the best that eight registers allow.
  template <class Between>
  static void multiply(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps, float* c, Between between) {
    __asm__ volatile("" ::: "memory");  // the loads below do not say what they read
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::int64_t step = 0; step < steps; step++, a += 512, b += 512) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + 256, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 256, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      between(step);
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    _tile_stored(2, c + 512, 128);
    _tile_stored(3, c + 528, 128);
  }
};

#elif defined(BUPO_NEON)

// A product of `high` rows of C by `wide` columns at a time: its sums are 16 of the 32 registers.
struct Block {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  static constexpr bool multiplies_bf16 = true;
  static constexpr int high = 8, wide = 8;
#else
  static constexpr bool multiplies_bf16 = false;
  static constexpr int high = 4, wide = 16;
#endif
  static constexpr bool interleaves = false;

  struct Session {
    ~Session() {}
  };

  // Must not be inlined: among an epilogue's variables the sums would lose their registers.
  __attribute__((noinline)) static void multiply_part(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps, float* c,
                                                      bool first) {
    for (int row = 0; row < 32; row += high)
      for (int column = 0; column < 32; column += wide)
        multiply_some(a + row / 16 * 256 + row % 16 * 16, b + column / 16 * 256 + column % 16, steps, c + row * 32 + column, first);
  }

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  // The instruction multiplies 2 rows of A by 2 columns of B, four deep: [row][2 words] by [column][2 words]. As panels
  // lie, such rows are two halves that are put together, and two zips make such columns of two words of four: 8 of these for 16
  // products.
  static void multiply_some(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps, float* c, bool first) {
    float32x4_t sum[4][4];  // of 2 rows by 2 columns
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j += 2) {
        const float* from = c + 64 * i + 2 * j;
        const uint64x2_t upper = first ? vdupq_n_u64(0) : load_as<uint64x2_t>(from);
        const uint64x2_t lower = first ? vdupq_n_u64(0) : load_as<uint64x2_t>(from + 32);
        sum[i][j] = vreinterpretq_f32_u64(vzip1q_u64(upper, lower));
        sum[i][j + 1] = vreinterpretq_f32_u64(vzip2q_u64(upper, lower));
      }
    for (std::int64_t step = 0; step < steps; step++, a += 512, b += 512)
      for (int word = 0; word < 16; word += 2) {
        bfloat16x8_t rows[4], columns[4];  // two of each
        for (int i = 0; i < 4; i++) {
          const std::uint32_t* from = a + 32 * i + word;
          rows[i] = vreinterpretq_bf16_u32(vcombine_u32(vld1_u32(from), vld1_u32(from + 16)));
        }
        for (int j = 0; j < 4; j += 2) {
          const std::uint32_t* from = b + 16 * word + 2 * j;
          const uint32x4_t even = vld1q_u32(from), odd = vld1q_u32(from + 16);
          columns[j] = vreinterpretq_bf16_u32(vzip1q_u32(even, odd));
          columns[j + 1] = vreinterpretq_bf16_u32(vzip2q_u32(even, odd));
        }
        for (int i = 0; i < 4; i++)
          for (int j = 0; j < 4; j++) sum[i][j] = vbfmmlaq_f32(sum[i][j], rows[i], columns[j]);
      }
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j += 2) {
        const uint64x2_t left = vreinterpretq_u64_f32(sum[i][j]), right = vreinterpretq_u64_f32(sum[i][j + 1]);
        store_as(c + 64 * i + 2 * j, vzip1q_u64(left, right));
        store_as(c + 64 * i + 32 + 2 * j, vzip2q_u64(left, right));
      }
  }
#else
  // Two words of a row are loaded together, and each is a lane by which a word of 16 columns is multiplied.
  static void multiply_some(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps, float* c, bool first) {
    float32x4_t sum[4][4];
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++) sum[i][j] = first ? vdupq_n_f32(0.0f) : vld1q_f32(c + 32 * i + 4 * j);
    for (std::int64_t step = 0; step < steps; step++, a += 512, b += 512)
      for (int word = 0; word < 16; word += 2) {
        float32x2_t rows[4];
        float32x4_t even[4], odd[4];
        for (int i = 0; i < 4; i++) rows[i] = vreinterpret_f32_u32(vld1_u32(a + 16 * i + word));
        for (int j = 0; j < 4; j++) {
          const std::uint32_t* from = b + 16 * word + 4 * j;
          even[j] = vreinterpretq_f32_u32(vld1q_u32(from)), odd[j] = vreinterpretq_f32_u32(vld1q_u32(from + 16));
        }
        for (int i = 0; i < 4; i++)
          for (int j = 0; j < 4; j++)
            sum[i][j] = vfmaq_lane_f32(vfmaq_lane_f32(sum[i][j], even[j], rows[i], 0), odd[j], rows[i], 1);
      }
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++) vst1q_f32(c + 32 * i + 4 * j, sum[i][j]);
  }
#endif
};

#else

// A product of `high` rows of C by `wide` vectors at a time: its sums are 16 of 32 registers where there are 32, else 8 of 16,
// which covers the latency of the multiply-add twice over.
struct Block {
#if defined(__AVX512BF16__)
  static constexpr bool multiplies_bf16 = true;
#else
  static constexpr bool multiplies_bf16 = false;
#endif
  static constexpr bool interleaves = false;
  static constexpr int high = registers / 4, wide = 2, unrolled = 4;

  struct Session {
    ~Session() {}
  };

  static Vec multiply_add(std::uint32_t a, const std::uint32_t* b, Vec c) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)c.v, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)_mm512_loadu_si512(b));
#else
    return c + Vec((Floats)(a + Words{})) * Vec((Floats)load_as<Words>(b));
#endif
  }

  // Must not be inlined: among an epilogue's variables the sums would lose their registers.
  __attribute__((noinline)) static void multiply_part(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps, float* c,
                                                      bool first) {
    for (int column = 0; column < 32; column += wide * lanes)
      for (int row = 0; row < 32; row += high) {
        Vec sum[high][wide];
        for (int i = 0; i < high; i++)
          for (int j = 0; j < wide; j++) sum[i][j] = first ? Vec(0.0f) : Vec::load(c + (row + i) * 32 + column + j * lanes);
        const std::uint32_t* a_row = a + row / 16 * 256 + row % 16 * 16;
        for (std::int64_t step = 0; step < steps; step++) {
          for (int i = 0; i < high; i++) __builtin_prefetch(a_row + (step + 1) * 512 + i * 16);
          for (int word = 0; word < 16; word += unrolled)
            for (int w = word; w < word + unrolled; w++)
              for (int j = 0; j < wide; j++) {
                const int at = column + j * lanes;
                const std::uint32_t* b_column = b + step * 512 + at / 16 * 256 + w * 16 + at % 16;
                for (int i = 0; i < high; i++) sum[i][j] = multiply_add(a_row[step * 512 + i * 16 + w], b_column, sum[i][j]);
              }
        }
        for (int i = 0; i < high; i++)
          for (int j = 0; j < wide; j++) sum[i][j].store(c + (row + i) * 32 + column + j * lanes);
      }
  }
};

#endif
