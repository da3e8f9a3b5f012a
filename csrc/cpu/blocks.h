// The product C[32 x 32] = A · B of a left and a right panel with fp32 accumulators, in the instructions of one set.
//
// `between(step)` is called in every step: while a tile unit multiplies, the vector units are free for the block before. Where
// there is no tile unit, `interleaves` is false and it is not called.
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
  static constexpr int high = lanes == 16 ? 8 : 4, wide = 2;

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

  template <class Between>
  static void multiply(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps, float* c, Between) {
    multiply(a, b, steps, c);
  }
  // Must not be inlined: among an epilogue's variables the sums would lose their registers.
  __attribute__((noinline)) static void multiply(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps, float* c) {
    for (int row = 0; row < 32; row += high)
      for (int column = 0; column < 32; column += wide * lanes) {
        Vec sum[high][wide];
        for (auto& row_sums : sum)
          for (Vec& x : row_sums) x = 0.0f;
        const std::uint32_t* a_row = a + row / 16 * 256 + row % 16 * 16;
        for (std::int64_t step = 0; step < steps; step++)
          for (int word = 0; word < 16; word++)
            for (int j = 0; j < wide; j++) {
              const int first = column + j * lanes;
              const std::uint32_t* b_column = b + step * 512 + first / 16 * 256 + word * 16 + first % 16;
              for (int i = 0; i < high; i++) sum[i][j] = multiply_add(a_row[step * 512 + i * 16 + word], b_column, sum[i][j]);
            }
        for (int i = 0; i < high; i++)
          for (int j = 0; j < wide; j++) sum[i][j].store(c + (row + i) * 32 + column + j * lanes);
      }
  }
};

#endif
