// Eight threads that call the kernels of csrc/cpu at once, each kernel on one thread: inputs shared and read only,
// outputs and workspaces each thread's own, on every CPU target that this processor has. Each result has to be that of
// a lone call, bit for bit, and ThreadSanitizer, with which this is built, has to see no race. Without Python.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/targets.h"

namespace flatcore::cpu {
namespace {

constexpr int kThreads = 8;
constexpr int64_t kRows = 37, kFeatures = 70, kClasses = 23;
constexpr int64_t kLongRow = 70000;  // row_norms cuts rows of more than 65,536
constexpr uint32_t kAllFields = (1U << kFieldCount) - 1;

size_t index(int64_t i) { return static_cast<size_t>(i); }

// Numbers of at most 8 bits, the same in every dtype.
std::vector<double> drawn(int64_t count, uint64_t seed) {
  std::vector<double> x(index(count));
  uint64_t state = 2 * seed + 1;
  for (double& value : x) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    value = (static_cast<double>(state >> 56) - 128.0) / 64.0;
  }
  return x;
}

// Class 5's row is class 3's, and so, but for one entry, is class 9's.
std::vector<double> drawn_weight() {
  std::vector<double> w = drawn(kClasses * kFeatures, 2);
  for (int64_t d = 0; d < kFeatures; ++d) {
    w[index(5 * kFeatures + d)] = w[index(9 * kFeatures + d)] = w[index(3 * kFeatures + d)] = d == 0 ? 1.0 : 2.0;
  }
  w[index(9 * kFeatures)] += 1.0 / 128;
  return w;
}

std::vector<int64_t> labels() {
  std::vector<int64_t> target(index(kRows));
  for (int64_t n = 0; n < kRows; ++n) target[index(n)] = n % 7 == 0 ? -100 : n % kClasses;
  return target;
}

// A matrix in one of the element types.
class Stored {
 public:
  Stored(const std::vector<double>& x, int64_t columns, Dtype dtype) : columns_(columns), dtype_(dtype) {
    for (const double value : x) {
      const float narrow = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &narrow, sizeof(bits));
      if (dtype == Dtype::kFloat64) add(value);
      if (dtype == Dtype::kFloat32) add(narrow);
      if (dtype == Dtype::kBFloat16) add(static_cast<uint16_t>(bits >> 16));
    }
  }
  Matrix matrix() const { return {bytes_.data(), columns_, 1, dtype_}; }

 private:
  template <class T>
  void add(T value) {
    char bytes[sizeof(T)];
    std::memcpy(bytes, &value, sizeof(T));
    bytes_.insert(bytes_.end(), bytes, bytes + sizeof(T));
  }
  int64_t columns_;
  Dtype dtype_;
  std::vector<char> bytes_;
};

struct Inputs {
  explicit Inputs(Dtype type) : dtype(type) {}

  HeadProblem problem(uint32_t fields, bool given, bool with_bias) const {
    HeadProblem problem;
    problem.features = stored_features.matrix();
    problem.weight = stored_weight.matrix();
    if (given) problem.logits = stored_logits.matrix();
    problem.bias = with_bias ? bias.data() : nullptr;
    problem.include_bias = with_bias;
    problem.target = target.data();
    problem.N = kRows;
    problem.D = kFeatures;
    problem.C = kClasses;
    problem.temperature = 2.0;
    problem.fields = fields;
    problem.double_compute = dtype == Dtype::kFloat64;
    problem.double_values = true;
    return problem;
  }

  const Dtype dtype;
  const std::vector<double> features = drawn(kRows * kFeatures, 1), weight = drawn_weight(),
                            logits = drawn(kRows * kClasses, 3), bias = drawn(kClasses, 4), upstream = drawn(kRows, 5),
                            log_coefficient = drawn(kRows, 6), row_weight = std::vector<double>(index(kRows), 0.5);
  const std::vector<int64_t> target = labels();
  const Stored stored_features{features, kFeatures, dtype}, stored_weight{weight, kFeatures, dtype},
      stored_logits{logits, kClasses, dtype}, long_rows{drawn(3 * kLongRow, 7), kLongRow, dtype};
};

// What a stem's kernels wrote.
struct Written {
  std::vector<char> bytes;
  bool numbers = true;  // none is NaN

  template <class T>
  void add(const std::vector<T>& x) {
    const char* from = reinterpret_cast<const char*>(x.data());
    bytes.insert(bytes.end(), from, from + x.size() * sizeof(T));
    for (const T value : x) numbers &= !std::isnan(static_cast<double>(value));
  }
};

// Zeroed memory, aligned to 64 bytes.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(index(bytes + 64)) {}
  void* get() { return memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64; }

 private:
  std::vector<char> memory_;
};

Written fused(const Target& kernels, const Inputs& in) {
  Written out;
  for (const bool given : {false, true}) {
    HeadMetrics call;
    static_cast<HeadProblem&>(call) = in.problem(kAllFields, given, !given);
    std::vector<double> values(index(kFieldCount * kRows));
    std::vector<int64_t> prediction(index(kRows));
    call.values = values.data();
    call.prediction = prediction.data();
    Workspace workspace(head_metrics_workspace(call));
    call.workspace = workspace.get();
    kernels.head_metrics(call);
    out.add(values);
    out.add(prediction);
    for (const bool log : {false, true}) {
      HeadReduction reduce;
      std::vector<double> value(1), coefficient(index(kRows));
      reduce.logs = values.data() + kLogHessianTrace * kRows;
      reduce.sample_weights = log ? in.row_weight.data() : nullptr;
      reduce.target = in.target.data();
      reduce.N = kRows;
      reduce.log = log;
      reduce.double_value = true;
      reduce.value = value.data();
      reduce.log_coefficient = log ? coefficient.data() : nullptr;
      kernels.head_reduction(reduce);
      out.add(value);
      out.add(coefficient);
    }
  }
  return out;
}

// The measures whose gradient there is.
constexpr Field kMeasures[] = {kLogHessianTrace, kLogLayerwise,     kLogNeuronwise,
                               kLogGradientNorm, kLogGradientNorm1, kLogGradientNormInf};

template <class S>
Written fused_backward(const Target& kernels, const Inputs& in) {
  Written out;
  for (const Field field : kMeasures) {
    for (const bool given : {false, true}) {
      HeadMetricsBackward call;
      static_cast<HeadProblem&>(call) = in.problem(1U << field, given, !given);
      std::vector<S> d_features(index(kRows * kFeatures)), d_weight(index(kClasses * kFeatures)),
          d_logits(index(kRows * kClasses));
      std::vector<double> d_bias(index(kClasses));
      call.upstream = in.upstream.data();
      call.log_coefficient = in.log_coefficient.data();
      call.d_features = d_features.data();
      call.d_weight = d_weight.data();
      call.d_bias = given ? nullptr : d_bias.data();
      call.d_logits = given ? d_logits.data() : nullptr;
      Workspace workspace(head_metrics_backward_workspace(call));
      call.workspace = workspace.get();
      kernels.head_metrics_backward(call);
      out.add(d_features);
      out.add(d_weight);
      out.add(d_logits);
      out.add(d_bias);
    }
  }
  return out;
}

// What a large head's loops know of W, and the products that torch forms there.
struct LargeHead {
  LargeHead(const Target& kernels, const HeadProblem& problem, const Inputs& in) : inputs(in) {
    HeadSummary call;
    call.weight = problem.weight;
    call.C = kClasses;
    call.D = kFeatures;
    call.bias = problem.bias;
    call.double_compute = problem.double_compute;
    call.row_squares = row_squares.data();
    call.row_largest = row_largest.data();
    call.summary = summary.data();
    call.center = center.data();
    call.centered_squares = squares.data();
    kernels.head_summary(call);
    HeadRepeats found;
    found.weight = problem.weight;
    found.C = kClasses;
    found.D = kFeatures;
    found.exponent = static_cast<int>(summary[1]);
    found.centered_squares = squares.data();
    found.keys = keys.data();
    found.members = members.data();
    found.starts = starts.data();
    found.near = near.data();
    found.near_of = near_of.data();
    const RepeatCounts counts = kernels.head_repeats(found);
    if (counts.groups != 1 || counts.members != 3 || counts.near < 1) std::abort();  // as drawn_weight has them
    repeats = {members.data(), starts.data(), counts.groups, near.data(), near_of.data(), counts.near};
    scale = std::scalbn(1.0, found.exponent);
  }

  template <class S>
  std::vector<S> products() const {
    std::vector<S> z(index(kRows * kClasses));
    for (int64_t n = 0; n < kRows; ++n) {
      for (int64_t j = 0; j < kClasses; ++j) {
        double sum = 0.0;
        for (int64_t d = 0; d < kFeatures; ++d) sum += inputs.features[index(n * kFeatures + d)] * entry(j, d);
        z[index(n * kClasses + j)] = static_cast<S>(sum);
      }
    }
    return z;
  }
  // merged (2^e W - center) + near_q (2^e (W_near - W_near_of))
  template <class S>
  std::vector<double> means(const std::vector<S>& merged, const std::vector<S>& near_q) const {
    std::vector<double> mean(index(kRows * kFeatures));
    for (int64_t n = 0; n < kRows; ++n) {
      for (int64_t d = 0; d < kFeatures; ++d) {
        double sum = 0.0;
        for (int64_t j = 0; j < kClasses; ++j) {
          sum += static_cast<double>(merged[index(n * kClasses + j)]) * (scale * entry(j, d) - center[index(d)]);
        }
        for (int64_t k = 0; k < repeats.near_count; ++k) {
          sum += static_cast<double>(near_q[index(n * repeats.near_count + k)]) * scale *
                 (entry(repeats.near[k], d) - entry(repeats.near_of[k], d));
        }
        mean[index(n * kFeatures + d)] = sum;
      }
    }
    return mean;
  }
  double entry(int64_t j, int64_t d) const { return inputs.weight[index(j * kFeatures + d)]; }

  const Inputs& inputs;
  std::vector<double> row_squares = std::vector<double>(index(kClasses)), row_largest = row_squares,
                      squares = row_squares, summary = std::vector<double>(2),
                      center = std::vector<double>(index(kFeatures + 1)),
                      keys = std::vector<double>(index(kClasses + kFeatures + 1));
  std::vector<int64_t> members = std::vector<int64_t>(index(kClasses)),
                       starts = std::vector<int64_t>(index(kClasses + 1)), near = members, near_of = members;
  Repeats repeats;
  double scale = 1.0;
};

// Rows in the loop's first step: the statistics, and q with the shares that the product takes.
template <class S>
struct Chunk : HeadChunk {
  Chunk(const Target& kernels, const HeadProblem& problem, const LargeHead& head)
      : HeadChunk{}, shares(head.products<S>()), merged_shares(shares.size()) {
    static_cast<HeadProblem&>(*this) = problem;
    near_shares.resize(index(kRows * head.repeats.near_count));
    HeadChunk::rows = kRows;
    z = q = shares.data();
    z_stride = q_stride = merged_stride = kClasses;
    repeats = head.repeats;
    merged = merged_shares.data();
    near_q = near_shares.data();
    summary = head.summary.data();
    center = head.center.data();
    centered_squares = head.squares.data();
    row_state = states.data();
    kernels.head_chunk_statistics(*this);
  }
  std::vector<S> shares, merged_shares, near_shares;
  std::vector<HeadRow> states = std::vector<HeadRow>(index(kRows));
};

template <class S>
Written chunked(const Target& kernels, const Inputs& in) {
  Written out;
  std::vector<double> values(index(kFieldCount * kRows)), scratch(index(head_chunk_scratch(kClasses, kFeatures)));
  std::vector<int64_t> prediction(index(kRows));
  HeadProblem problem = in.problem(kAllFields, false, false);
  problem.values = values.data();
  problem.prediction = prediction.data();
  const LargeHead head(kernels, problem, in);
  {
    Chunk<S> chunk(kernels, problem, head);
    const std::vector<double> mean = head.means(chunk.merged_shares, chunk.near_shares);
    chunk.mean = mean.data();
    chunk.mean_stride = kFeatures;
    chunk.scratch = scratch.data();
    kernels.head_chunk_weights(chunk);
    out.add(chunk.shares);
    out.add(values);
    out.add(prediction);
  }
  HeadDistances table;  // of the weight in the compute type
  const Stored rows(in.weight, kFeatures, sizeof(S) == 8 ? Dtype::kFloat64 : Dtype::kFloat32);
  std::vector<S> distances(index(kClasses * kClasses)), spread(index(kRows * kClasses));
  table.weight = rows.matrix();
  table.C = kClasses;
  table.D = kFeatures;
  table.exponent = static_cast<int>(head.summary[1]);
  table.distances = distances.data();
  kernels.head_distances(table);
  problem.fields &= ~kGradientFields;
  Chunk<S> chunk(kernels, problem, head);
  for (int64_t n = 0; n < kRows; ++n) {
    for (int64_t k = 0; k < kClasses; ++k) {
      S sum = 0;
      for (int64_t j = 0; j < kClasses; ++j) {
        sum += chunk.shares[index(n * kClasses + j)] * distances[index(j * kClasses + k)];
      }
      spread[index(n * kClasses + k)] = sum;
    }
  }
  chunk.distance = spread.data();
  chunk.distance_stride = kClasses;
  chunk.scratch = scratch.data();
  kernels.head_chunk_weights(chunk);
  out.add(distances);
  out.add(values);
  return out;
}

template <class S>
Written chunked_backward(const Target& kernels, const Inputs& in) {
  Written out;
  for (const Field field : kMeasures) {
    std::vector<double> values(index(kRows)), scratch(index(head_chunk_scratch(kClasses, kFeatures)));
    HeadProblem problem = in.problem(1U << field, false, false);
    problem.values = values.data();
    const LargeHead head(kernels, problem, in);
    const Chunk<S> chunk(kernels, problem, head);
    std::vector<HeadBackwardRow> rows(index(kRows));
    std::vector<S> q = chunk.shares, g = q, direction(index(kRows * kFeatures)), top_row = direction,
                   d_features = direction, d_weight(index(kClasses * kFeatures));
    std::vector<double> top_bias(index(kRows));
    std::vector<int64_t> top(index(kRows));
    const std::vector<double> mean = head.means(chunk.merged_shares, chunk.near_shares);
    HeadBackwardChunk call;
    static_cast<HeadProblem&>(call) = problem;
    call.upstream = in.upstream.data();
    call.log_coefficient = in.log_coefficient.data();
    call.rows = kRows;
    call.q = q.data();
    call.q_stride = call.g_stride = kClasses;
    call.summary = head.summary.data();
    call.center = head.center.data();
    call.centered_squares = head.squares.data();
    call.row_state = chunk.states.data();
    call.numbers = rows.data();
    call.mean = mean.data();
    call.direction = direction.data();
    call.top_row = field == kLogNeuronwise ? top_row.data() : nullptr;
    call.top_bias = field == kLogNeuronwise ? top_bias.data() : nullptr;
    call.top = field == kLogNeuronwise ? top.data() : nullptr;
    if (1U << field & kWeightFields) {
      kernels.head_chunk_directions(call);
      for (int64_t n = 0; n < kRows; ++n) {
        for (int64_t j = 0; j < kClasses; ++j) {
          double sum = 0.0;
          for (int64_t d = 0; d < kFeatures; ++d) {
            sum += static_cast<double>(direction[index(n * kFeatures + d)]) *
                   (head.scale * head.entry(j, d) - head.center[index(d)]);
          }
          g[index(n * kClasses + j)] = static_cast<S>(sum);
        }
      }
    }
    call.g = 1U << field & kWeightFields ? g.data() : q.data();
    call.d_features = d_features.data();
    call.d_weight = d_weight.data();
    call.scratch = scratch.data();
    kernels.head_chunk_cotangent(call);
    for (const std::vector<S>* written : {&q, &g, &direction, &top_row, &d_features, &d_weight}) out.add(*written);
    out.add(top_bias);
    out.add(top);
  }
  return out;
}

template <class S>
Written row_norms(const Target& kernels, const Inputs& in) {
  Written out;
  for (const bool is_long : {false, true}) {
    RowNorms call;
    call.x = is_long ? in.long_rows.matrix() : in.stored_features.matrix();
    call.N = is_long ? 3 : kRows;
    call.K = is_long ? kLongRow : kFeatures;
    std::vector<double> workspace(index(row_norms_workspace(call.N, call.K)));
    std::vector<S> l1(index(call.N)), l2 = l1, linf = l1;
    call.l1 = l1.data();
    call.l2 = l2.data();
    call.linf = linf.data();
    call.workspace = workspace.data();
    kernels.row_norms(call);
    for (const std::vector<S>* norm : {&l1, &l2, &linf}) out.add(*norm);
  }
  return out;
}

template <class S>
Written unmasked_cross_entropy(const Target& kernels, const Inputs& in) {
  Written out;
  UnmaskedCrossEntropy call;
  std::vector<S> loss(index(kRows)), log_scale = loss;
  std::vector<char> cotangent(index(kRows * kClasses) * sizeof(double));
  call.logits = in.stored_logits.matrix();
  call.target = in.target.data();
  call.N = kRows;
  call.C = kClasses;
  call.loss = loss.data();
  call.log_scale = log_scale.data();
  call.cotangent = cotangent.data();
  kernels.unmasked_cross_entropy(call);
  out.add(loss);
  out.add(log_scale);
  out.add(cotangent);
  return out;
}

struct Stem {
  const char* name;
  Written (*run)(const Target&, const Inputs&);
};
template <class S>
constexpr Stem kStems[] = {
    {"head_metrics, fused", fused},        {"head_metrics_backward, fused", fused_backward<S>},
    {"head_metrics, chunked", chunked<S>}, {"head_metrics_backward, chunked", chunked_backward<S>},
    {"row_norms", row_norms<S>},           {"unmasked_cross_entropy", unmasked_cross_entropy<S>},
};

// The number of results that are not those of a lone call, or that are NaN.
template <class S>
int differing(const Target& kernels, Dtype dtype) {
  constexpr int count = sizeof(kStems<S>) / sizeof(Stem);
  const Inputs inputs(dtype);
  Written lone[count];
  std::atomic<int> wrong{0}, waiting{kThreads};
  for (int i = 0; i < count; ++i) {
    lone[i] = kStems<S>[i].run(kernels, inputs);
    if (lone[i].numbers) continue;
    std::printf("%s, %s: a result is NaN\n", kernels.name, kStems<S>[i].name);
    ++wrong;
  }
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (--waiting; waiting > 0;) std::this_thread::yield();
      for (int i = 0; i < 2 * count; ++i) {  // every stem, from another one on, and all once more from the first
        const int which = (i < count ? i + thread : i) % count;
        if (kStems<S>[which].run(kernels, inputs).bytes == lone[which].bytes) continue;
        std::printf("%s, %s: thread %d got another result than a lone call\n", kernels.name, kStems<S>[which].name,
                    thread);
        ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return wrong;
}

}  // namespace
}  // namespace flatcore::cpu

int main() {
  using flatcore::Dtype;
  int wrong = 0;
  for (const flatcore::cpu::Target* target : flatcore::cpu::usable_targets()) {
    wrong += flatcore::cpu::differing<float>(*target, Dtype::kBFloat16);
    wrong += flatcore::cpu::differing<float>(*target, Dtype::kFloat32);
    wrong += flatcore::cpu::differing<double>(*target, Dtype::kFloat64);
    std::printf("%s: done\n", target->name);
  }
  return wrong == 0 ? 0 : 1;
}
