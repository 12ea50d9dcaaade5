// Schema and CPU kernel of ucan_fast::_shrink_native_, through PyTorch's stable ABI.
//
// z = x Aᵀ where A has few rows. BLAS cuts such a product as if it were a wide one; here every value
// of x is read once per panel of A's rows, whose products stay in registers, and A lies in the cache
// in the order in which it is read. Narrow rows of x are widened on the way.
//
// A value of z is the sum, over stretches of kDepth columns, of sums taken in the order of the
// columns: its bits depend neither on the other rows of x and A nor on the number of threads.

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace ucan_fast {
namespace {

constexpr int64_t kDepth = 256;     // columns that are summed up in one register
constexpr int64_t kTaskRows = 64;   // of x: what is known of their z stays in the cache
constexpr int kPanelVectors = 3;    // at most
constexpr int64_t kWork = 1 << 19;  // products that are worth waking a thread for

// ---- What is compiled once per instruction set ----

// sums[i][v] += Σ_p rows[i][p] panel[p][v], for kTile rows and kVectors vectors of A's rows.
template <int kBytes, int kTile, int kVectors, typename W>
UCAN_INLINE void multiply_tile(
    const W* const* rows, const W* panel, int64_t depth, W* sums, int64_t sums_stride) {
  using Vector = typename Vectors<W, kBytes>::type;
  using Memory = typename Vectors<W, kBytes>::unaligned;
  constexpr int kLanes = kBytes / sizeof(W);
  Vector product[kTile][kVectors] = {};
  const W* row[kTile];
  for (int i = 0; i < kTile; ++i) row[i] = rows[i];
  for (int64_t p = 0; p < depth; ++p) {
    Vector a[kVectors];
    UCAN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      a[v] = *reinterpret_cast<const Memory*>(panel + (p * kVectors + v) * kLanes);
    }
    UCAN_UNROLL
    for (int i = 0; i < kTile; ++i) {
      const W factor = row[i][p];
      UCAN_UNROLL
      for (int v = 0; v < kVectors; ++v) product[i][v] += factor * a[v];
    }
  }
  UCAN_UNROLL
  for (int i = 0; i < kTile; ++i) {
    UCAN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      *reinterpret_cast<Memory*>(sums + i * sums_stride + v * kLanes) += product[i][v];
    }
  }
}

template <typename W>
struct Call {
  Source x;
  const W* panels;  // A: [panels][columns][panel width], zero where A ends
  int64_t count;    // panels
  W* z;             // contiguous
  int64_t rows, columns, rank;
};

// Rows [first, last) of x. `sums` is [kTaskRows][panels * panel width].
template <typename Set, int kVectors, typename W>
UCAN_INLINE void run_task(const Call<W>& call, int64_t first, int64_t last, W* sums) {
  constexpr int kTile = Set::tile;
  constexpr int64_t kWidth = kVectors * Set::bytes / sizeof(W);
  const int64_t stride = call.count * kWidth;
  alignas(64) W buffer[kTile][kDepth];
  std::fill_n(sums, divide_up(last - first, kTile) * kTile * stride, W(0));
  for (int64_t column = 0; column < call.columns; column += kDepth) {
    const int64_t depth = std::min(kDepth, call.columns - column);
    for (int64_t row = first; row < last; row += kTile) {
      const W* rows[kTile];
      for (int i = 0; i < kTile; ++i) {
        // Where no row is left, the last one once more: its sums go nowhere.
        rows[i] = row + i < last ? row_of(call.x, row + i, column, depth, buffer[i]) : rows[i - 1];
      }
      for (int64_t panel = 0; panel < call.count; ++panel) {
        const W* values = call.panels + (panel * call.columns + column) * kWidth;
        W* out = sums + (row - first) * stride + panel * kWidth;
        Set::template multiply<kVectors, W>(rows, values, depth, out, stride);
      }
    }
  }
  for (int64_t row = first; row < last; ++row) {
    std::copy_n(sums + (row - first) * stride, call.rank, call.z + row * call.rank);
  }
}

template <typename W>
using Task = void (*)(const Call<W>&, int64_t, int64_t, W*);

template <typename W>
struct Code {
  Task<W> tasks[kPanelVectors];  // for panels of 1, 2, .. vectors
  int64_t lanes;
};

// The tiles are functions of their own: among the rest of a task compilers run out of registers.
#define UCAN_SET(name, attribute, vector_bytes, tile_rows)                                       \
  struct name {                                                                                  \
    static constexpr int tile = tile_rows, bytes = vector_bytes;                                 \
    template <int kVectors, typename W>                                                          \
    UCAN_APART attribute static void multiply(                                                   \
        const W* const* rows, const W* panel, int64_t depth, W* sums, int64_t stride) {          \
      multiply_tile<bytes, tile, kVectors>(rows, panel, depth, sums, stride);                    \
    }                                                                                            \
    template <int kVectors, typename W>                                                          \
    attribute static void task(const Call<W>& call, int64_t first, int64_t last, W* sums) {      \
      run_task<name, kVectors>(call, first, last, sums);                                         \
    }                                                                                            \
    template <typename W>                                                                        \
    static constexpr Code<W> code() {                                                            \
      return {{task<1, W>, task<2, W>, task<3, W>}, bytes / static_cast<int64_t>(sizeof(W))};    \
    }                                                                                            \
  };

// As many products at a time as fit into 16 vector registers, or 32, beside what makes them.
UCAN_SET(Plain, , 16, 4)
#if UCAN_X86
UCAN_SET(Avx2, UCAN_AVX2, 32, 4)
UCAN_SET(Avx512, UCAN_AVX512, 64, 8)
#endif
#undef UCAN_SET

template <typename W>
Code<W> best_code() {
#if UCAN_X86
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return Avx512::code<W>();
    case InstructionSet::avx2:
      return Avx2::code<W>();
    case InstructionSet::plain:
      break;
  }
#endif
  return Plain::code<W>();
}

// ---- Once per call ----

// Vectors of a panel: the fewest vectors of padding, then the fewest panels.
int panel_vectors(int64_t vectors) {
  int best = 1;
  for (int some = 2; some <= kPanelVectors; ++some) {
    if (divide_up(vectors, some) * some <= divide_up(vectors, best) * best) best = some;
  }
  return best;
}

template <typename W>
void run(Call<W> call, const Tensor& a) {
  static const Code<W> code = best_code<W>();
  const int vectors = panel_vectors(divide_up(call.rank, code.lanes));
  const int64_t width = vectors * code.lanes, columns = call.columns;
  call.count = divide_up(call.rank, width);
  const std::unique_ptr<W[]> packed(new W[call.count * width * columns]);
  const W* values = static_cast<const W*>(a.const_data_ptr());
  for (int64_t r = 0; r < call.count * width; ++r) {
    W* to = packed.get() + r / width * width * columns + r % width;
    const W* from = values + r * a.stride(0);
    const int64_t step = a.stride(1);
    for (int64_t p = 0; p < columns; ++p) to[p * width] = r < call.rank ? from[p * step] : W(0);
  }
  call.panels = packed.get();
  const int64_t tasks = divide_up(call.rows, kTaskRows);
  const int64_t products = std::max<int64_t>(1, kTaskRows * columns * call.rank);
  torch::stable::parallel_for(
      0, tasks, std::max<int64_t>(1, kWork / products), [&](int64_t begin, int64_t end) {
        const std::unique_ptr<W[]> sums(new W[kTaskRows * call.count * width]);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = task * kTaskRows;
          code.tasks[vectors - 1](
              call, first, std::min(call.rows, first + kTaskRows), sums.get());
        }
      });
}

template <typename W>
void shrink(const Source& x, const Tensor& a, const Tensor& z) {
  run(
      Call<W>{
          x, nullptr, 0, static_cast<W*>(z.mutable_data_ptr()), z.size(0), a.size(1), z.size(1)},
      a);
}

void shrink_cpu(const Tensor& x, const Tensor& a, const Tensor& z) {
  const char* op = "_shrink_native_";
  const bool wide = z.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      z.dim() == 2 && z.is_contiguous() && (wide || z.scalar_type() == ScalarType::Float), op,
      ": z must be a contiguous 2-D float32 or float64 tensor");
  const Source source = source_of(x, "_shrink_native_: x");
  STD_TORCH_CHECK(
      x.size(0) == z.size(0), op, ": x has ", x.size(0), " rows and z ", z.size(0));
  STD_TORCH_CHECK(
      wide || source.dtype != Dtype::float64, op, ": z must be float64 where x is");
  STD_TORCH_CHECK(
      a.dim() == 2 && a.size(0) == z.size(1) && a.size(1) == x.size(1) &&
          a.scalar_type() == z.scalar_type(),
      op, ": a must be [", z.size(1), ", ", x.size(1), "] of z's dtype");
  check_apart(x, z, op, "x", "z");
  check_apart(a, z, op, "a", "z");
  if (z.size(0) == 0 || z.size(1) == 0) return;
  if (wide) {
    shrink<double>(source, a, z);
  } else {
    shrink<float>(source, a, z);
  }
}

}  // namespace
}  // namespace ucan_fast

STABLE_TORCH_LIBRARY_FRAGMENT(ucan_fast, m) {
  m.def("_shrink_native_(Tensor x, Tensor a, Tensor(a!) z) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ucan_fast, CPU, m) {
  m.impl("_shrink_native_", TORCH_BOX(&ucan_fast::shrink_cpu));
}
