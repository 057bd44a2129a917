// Eight threads that call the kernels of csrc/cpu at once, each kernel on one thread: inputs shared and read only,
// outputs and workspaces each thread's own, on every CPU target that this processor has. Each result has to be that of
// a lone call, bit for bit, and ThreadSanitizer, with which this is built, has to see no race. Without Python.
#include <algorithm>
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
    call.keys = keys.data();
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

  // W_tile phi, the classes of the tile as given
  template <class S>
  std::vector<S> products(const std::vector<int64_t>& classes) const {
    std::vector<S> z;
    for (int64_t n = 0; n < kRows; ++n) {
      for (const int64_t j : classes) {
        double sum = 0.0;
        for (int64_t d = 0; d < kFeatures; ++d) sum += inputs.features[index(n * kFeatures + d)] * entry(j, d);
        z.push_back(static_cast<S>(sum));
      }
    }
    return z;
  }
  double entry(int64_t j, int64_t d) const { return inputs.weight[index(j * kFeatures + d)]; }

  const Inputs& inputs;
  std::vector<double> row_squares = std::vector<double>(index(kClasses)), row_largest = row_squares,
                      squares = row_squares, summary = std::vector<double>(3),
                      center = std::vector<double>(index(kFeatures + 1)),
                      keys = std::vector<double>(index(kClasses + kFeatures + 1));
  std::vector<int64_t> members = std::vector<int64_t>(index(kClasses)),
                       starts = std::vector<int64_t>(index(kClasses + 1)), near = members, near_of = members;
  Repeats repeats;
  double scale = 1.0;
};

// The values' loop over two tiles, the classes in the order of their groups, with the sums that torch forms there.
template <class S>
struct TwoTiles {
  TwoTiles(const Target& kernels, const HeadProblem& problem, const LargeHead& head) {
    static_cast<HeadProblem&>(loop) = problem;
    const int64_t grouped = head.repeats.starts[head.repeats.groups];
    for (int64_t k = 0; k < grouped; ++k) classes.push_back(head.repeats.members[k]);
    for (int64_t j = 0; j < kClasses; ++j) {
      if (std::find(classes.begin(), classes.begin() + grouped, j) == classes.begin() + grouped) classes.push_back(j);
    }
    for (int64_t k = 0; k < kClasses; ++k) {
      positions[index(classes[index(k)])] = k;
      squares[index(k)] = head.squares[index(classes[index(k)])];
    }
    for (int64_t k = 0; k < head.repeats.near_count; ++k) {
      near.push_back(positions[index(head.repeats.near[k])]);
      near_of.push_back(positions[index(head.repeats.near_of[k])]);
    }
    loop.summary = head.summary.data();
    loop.center = head.center.data();
    loop.centered_squares = squares.data();
    loop.classes = classes.data();
    loop.positions = positions.data();
    loop.tails = tails.data();
    loop.row_state = states.data();
    loop.mean = mean.data();
    loop.scratch = scratch.data();
    const int64_t bounds[] = {0, (grouped + kClasses) / 2, kClasses};
    for (int t = 0; t < 2; ++t) {
      const std::vector<int64_t> here(classes.begin() + bounds[t], classes.begin() + bounds[t + 1]);
      std::vector<S> z = head.products<S>(here), near_shares(index(kRows * head.repeats.near_count));
      HeadTile tile;
      tile.rows = kRows;
      tile.first_class = bounds[t];
      tile.classes = tile.z_stride = bounds[t + 1] - bounds[t];
      tile.z = z.data();
      tile.repeats.first = bounds[t];
      if (t == 0) {
        tile.repeats = {0, head.repeats.starts, 1, grouped, near.data(), near_of.data(), head.repeats.near_count};
      }
      tile.near = near_shares.data();
      kernels.head_loop_statistics(loop, tile);
      add(head, here, z, t == 0 ? near_shares : std::vector<S>{});
      shares.insert(shares.end(), z.begin(), z.end());
    }
    kernels.head_loop_values(loop, 0, kRows);
  }
  // mean += shares (2^e W - center) + near shares (2^e (W_near - W_near_of))
  void add(const LargeHead& head, const std::vector<int64_t>& here, const std::vector<S>& z,
           const std::vector<S>& near_shares) {
    for (int64_t n = 0; n < kRows; ++n) {
      for (int64_t d = 0; d < kFeatures; ++d) {
        double sum = 0.0;
        for (size_t k = 0; k < here.size(); ++k) {
          sum += static_cast<double>(z[index(n) * here.size() + k]) *
                 (head.scale * head.entry(here[k], d) - head.center[index(d)]);
        }
        for (size_t k = 0; k < near_shares.size() / index(kRows); ++k) {
          sum += static_cast<double>(near_shares[index(n) * near.size() + k]) * head.scale *
                 (head.entry(classes[index(near[k])], d) - head.entry(classes[index(near_of[k])], d));
        }
        mean[index(n * kFeatures + d)] += static_cast<S>(sum);
      }
    }
  }

  HeadLoop loop;
  std::vector<int64_t> classes, positions = std::vector<int64_t>(index(kClasses)), near, near_of;
  std::vector<double> squares = std::vector<double>(index(kClasses)),
                      scratch = std::vector<double>(index(head_chunk_scratch(kClasses, kFeatures)));
  std::vector<HeadTail> tails = std::vector<HeadTail>(index(kRows));
  std::vector<HeadRow> states = std::vector<HeadRow>(index(kRows));
  std::vector<S> mean = std::vector<S>(index(kRows * kFeatures)), shares;
};

template <class S>
Written chunked(const Target& kernels, const Inputs& in) {
  Written out;
  std::vector<double> values(index(kFieldCount * kRows));
  std::vector<int64_t> prediction(index(kRows));
  HeadProblem problem = in.problem(kAllFields, false, false);
  problem.values = values.data();
  problem.prediction = prediction.data();
  const LargeHead head(kernels, problem, in);
  const TwoTiles<S> tiles(kernels, problem, head);
  out.add(tiles.shares);
  out.add(tiles.mean);
  out.add(values);
  out.add(prediction);
  return out;
}

template <class S>
Written chunked_backward(const Target& kernels, const Inputs& in) {
  Written out;
  for (const Field field : kMeasures) {
    const HeadProblem problem = in.problem(1U << field, false, false);
    const LargeHead head(kernels, problem, in);
    const TwoTiles<S> tiles(kernels, problem, head);
    const bool weights = (1U << field & kWeightFields) != 0;
    std::vector<HeadBackwardRow> rows(index(kRows));
    std::vector<S> direction(index(kRows * kFeatures)), top_row = direction, d_features = direction,
                                                        d_weight(index(kClasses * kFeatures)),
                                                        explicit_g(index(kRows * kClasses));
    std::vector<double> top_bias(index(kRows)), scratch(index(head_chunk_scratch(kClasses, kFeatures)));
    std::vector<int64_t> top(index(kRows)), marked;
    HeadBackwardLoop call;
    static_cast<HeadProblem&>(call) = problem;
    call.upstream = in.upstream.data();
    call.log_coefficient = in.log_coefficient.data();
    call.summary = head.summary.data();
    call.center = head.center.data();
    call.centered_squares = head.squares.data();
    call.tails = tiles.tails.data();
    call.row_state = tiles.states.data();
    call.numbers = rows.data();
    call.mean = tiles.mean.data();
    call.direction = direction.data();
    call.top_row = top_row.data();
    call.top_bias = top_bias.data();
    call.top = top.data();
    call.d_features = d_features.data();
    call.d_weight = d_weight.data();
    call.scratch = scratch.data();
    kernels.head_backward_rows(call, 0, kRows);
    for (const int64_t first : {int64_t{0}, kClasses / 2}) {
      std::vector<int64_t> here;
      for (int64_t j = first; j < (first == 0 ? kClasses / 2 : kClasses); ++j) here.push_back(j);
      std::vector<S> z = head.products<S>(here), g = z;
      for (int64_t n = 0; n < kRows && weights; ++n) {
        for (size_t k = 0; k < here.size(); ++k) {
          double sum = 0.0;
          for (int64_t d = 0; d < kFeatures; ++d) {
            sum += static_cast<double>(direction[index(n * kFeatures + d)]) *
                   (head.scale * head.entry(here[k], d) - head.center[index(d)]);
          }
          g[index(n) * here.size() + k] = static_cast<S>(sum);
        }
      }
      const auto width = static_cast<int64_t>(here.size());
      kernels.head_backward_tile(call, {0, kRows, first, width, z.data(), weights ? g.data() : z.data(), width});
      out.add(z);
      out.add(g);
    }
    for (int64_t n = 0; n < kRows; ++n) {
      if (rows[index(n)].kind == kExplicit) marked.push_back(n);
    }
    const auto count = static_cast<int64_t>(marked.size());
    kernels.head_backward_explicit(call, 0, marked.data(), count, explicit_g.data());
    for (const std::vector<S>* written : {&direction, &top_row, &d_features, &d_weight, &explicit_g}) {
      out.add(*written);
    }
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
