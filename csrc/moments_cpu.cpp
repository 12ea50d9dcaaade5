// Schema and CPU kernel of ucan_fast::_moments_native_, through PyTorch's stable ABI.

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace ucan_fast {
namespace {

template <int kCount, typename W>
UCAN_INLINE void sum_rows(const W* const* rows, int64_t n, W* abs_sum, W* square_sum) {
  const W* row[kCount];
  for (int i = 0; i < kCount; ++i) row[i] = rows[i];
  UCAN_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    W a = 0, q = 0;
    for (int i = 0; i < kCount; ++i) {
      const W value = row[i][j];
      a += std::abs(value);
      q += value * value;
    }
    abs_sum[j] += a;
    square_sum[j] += q;
  }
}

// Batches [begin, end) of the columns [column, column + n).
template <typename W>
UCAN_INLINE void run_task(
    const Source& source, const Schedule& schedule, int64_t columns, int64_t begin, int64_t end,
    int64_t column, int64_t n, double* out) {
  Sums<W> sums;
  alignas(64) W buffer[kRows][kColumns];
  const W* rows[kRows];
  begin_sums(sums, n);
  for (int64_t b = begin; b < end; ++b) {
    const Batch& batch = schedule.batches[b];
    const int64_t* indices = schedule.rows.data() + batch.first;
    for (int i = 0; i < batch.count; ++i) {
      rows[i] = row_of(source, indices[i], column, n, buffer[i]);
    }
    W* abs_sum = sums.partial[0][batch.group];
    W* square_sum = sums.partial[1][batch.group];
    if (batch.count == kRows) {
      sum_rows<kRows>(rows, n, abs_sum, square_sum);
    } else {
      for (int i = 0; i < batch.count; ++i) sum_rows<1>(rows + i, n, abs_sum, square_sum);
    }
    end_batch(sums, batch.group, n);
  }
  end_sums(sums, n, out, columns);
}

template <typename W>
using Task = void (*)(
    const Source&, const Schedule&, int64_t, int64_t, int64_t, int64_t, int64_t, double*);

#define UCAN_TASK(name, attribute)                                                              \
  template <typename W>                                                                         \
  attribute void name(                                                                          \
      const Source& source, const Schedule& schedule, int64_t columns, int64_t begin,           \
      int64_t end, int64_t column, int64_t n, double* out) {                                    \
    run_task<W>(source, schedule, columns, begin, end, column, n, out);                         \
  }

UCAN_TASK(task_plain, )
#if UCAN_X86
UCAN_TASK(task_avx2, UCAN_AVX2)
UCAN_TASK(task_avx512, UCAN_AVX512)
#endif
#undef UCAN_TASK

template <typename W>
Task<W> best_task() {
#if UCAN_X86
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return task_avx512<W>;
    case InstructionSet::avx2:
      return task_avx2<W>;
    case InstructionSet::plain:
      break;
  }
#endif
  return task_plain<W>;
}

template <typename W>
void run(const Source& source, const Schedule& schedule, int64_t columns, double* moments) {
  static const Task<W> task = best_task<W>();
  run_tasks(
      schedule, columns, 16, moments,
      [&](int64_t begin, int64_t end, int64_t column, int64_t n, double* out) {
        task(source, schedule, columns, begin, end, column, n, out);
      });
}

void moments_cpu(
    const Tensor& h, const Tensor& groups, int64_t only_group, const Tensor& moments) {
  const char* op = "_moments_native_";
  const Source source = source_of(h, "_moments_native_: h");
  const int64_t n = h.size(1);
  double* totals = checked_moments(moments, n, op);
  const Schedule schedule = checked_schedule(groups, h.size(0), only_group, false, op);
  if (source.dtype == Dtype::float64) {
    run<double>(source, schedule, n, totals);
  } else {
    run<float>(source, schedule, n, totals);
  }
}

}  // namespace
}  // namespace ucan_fast

STABLE_TORCH_LIBRARY_FRAGMENT(ucan_fast, m) {
  m.def("_moments_native_(Tensor h, Tensor groups, int only_group, Tensor(a!) moments) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ucan_fast, CPU, m) {
  m.impl("_moments_native_", TORCH_BOX(&ucan_fast::moments_cpu));
}
