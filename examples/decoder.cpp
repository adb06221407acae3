// A language model's decoding loop on onepass alone: prefill and decode with a KV cache, first contiguous and then
// paged with a prefix that two sequences share. The weights are random, so the text makes no sense; what it shows is
// that every way of running the model chooses the same tokens.
#include <onepass/onepass.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string_view>
#include <vector>

namespace {

using onepass::DType;
using onepass::TensorView;
using Floats = std::vector<float>;

constexpr std::int64_t kLayers = 2, kWidth = 64, kHeads = 4, kHeadsKv = 2, kHeadDim = 16, kHidden = 128,
                       kVocabulary = 256;
constexpr std::int64_t kMaxTokens = 128;

// y = W x for every row of x, with random weights.
class Linear {
 public:
  Linear(std::int64_t in, std::int64_t out, std::mt19937& generator) : in_(in), weights_(in * out) {
    std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(in)));
    for (float& w : weights_) w = normal(generator);
  }

  Floats operator()(const Floats& x) const {
    const std::int64_t rows = static_cast<std::int64_t>(x.size()) / in_;
    const std::int64_t out = static_cast<std::int64_t>(weights_.size()) / in_;
    Floats y(rows * out, 0.0f);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t o = 0; o < out; ++o) {
        for (std::int64_t i = 0; i < in_; ++i) y[r * out + o] += weights_[o * in_ + i] * x[r * in_ + i];
      }
    }
    return y;
  }

 private:
  std::int64_t in_;
  Floats weights_;
};

// Each row over its root mean square.
Floats normalized(const Floats& x) {
  Floats y = x;
  for (std::size_t row = 0; row < x.size(); row += kWidth) {
    float squares = 1e-6f;
    for (std::int64_t i = 0; i < kWidth; ++i) squares += x[row + i] * x[row + i] / kWidth;
    for (std::int64_t i = 0; i < kWidth; ++i) y[row + i] = x[row + i] / std::sqrt(squares);
  }
  return y;
}

void add(Floats& x, const Floats& y) {
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

struct Layer {
  explicit Layer(std::mt19937& g)
      : q(kWidth, kHeads * kHeadDim, g),
        k(kWidth, kHeadsKv * kHeadDim, g),
        v(kWidth, kHeadsKv * kHeadDim, g),
        o(kHeads * kHeadDim, kWidth, g),
        up(kWidth, kHidden, g),
        down(kHidden, kWidth, g) {}
  Linear q, k, v, o, up, down;
};

struct Model {
  explicit Model(unsigned seed) : generator(seed), head(kWidth, kVocabulary, generator) {
    std::normal_distribution<float> normal;
    embedding.resize(kVocabulary * kWidth);
    for (float& x : embedding) x = normal(generator);
    for (std::int64_t i = 0; i < kLayers; ++i) layers.emplace_back(generator);
    for (std::int64_t position = 0; position < kMaxTokens; ++position) {
      for (std::int64_t pair = 0; pair < kHeadDim / 2; ++pair) {
        const double angle = static_cast<double>(position) * std::pow(1e4, -2.0 * static_cast<double>(pair) / kHeadDim);
        cosines.push_back(static_cast<float>(std::cos(angle)));
        sines.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }
  std::mt19937 generator;
  Linear head;
  Floats embedding, cosines, sines;
  std::vector<Layer> layers;
};

// The keys and values of all layers. Layers have storage of their own and share lengths and pages.
class Store {
 public:
  // page_size 0: one row of kMaxTokens for each sequence.
  Store(std::int64_t sequences, std::int64_t page_size, std::int64_t num_pages = 0)
      : page_size_(page_size), seqlens_(sequences, 0), references_(num_pages, 0) {
    shape_ = page_size == 0 ? Shape{sequences, kMaxTokens} : Shape{num_pages, page_size};
    if (page_size != 0) table_.assign(sequences * max_pages(), -1);
    keys_.assign(kLayers, Floats(shape_.blocks * shape_.tokens * kHeadsKv * kHeadDim));
    values_ = keys_;
  }

  onepass::KVCacheView layer(std::int64_t index) {
    onepass::KVCacheView view;
    const auto storage = [this](Floats& data) {
      return TensorView(data.data(), DType::kFloat32, {shape_.blocks, kHeadsKv, shape_.tokens, kHeadDim});
    };
    view.k = storage(keys_[index]);
    view.v = storage(values_[index]);
    view.seqlens = TensorView(seqlens_.data(), DType::kInt32, {sequences()});
    if (page_size_ != 0) view.page_table = TensorView(table_.data(), DType::kInt32, {sequences(), max_pages()});
    return view;
  }

  // Pages for `counts` more tokens of every sequence; shared ones are copied before they are written to.
  void reserve(const std::vector<std::int64_t>& counts) {
    if (page_size_ == 0) return;
    const std::vector<onepass::PageCopy> copies = pool().reserve(counts);
    for (std::int64_t i = 0; i < kLayers; ++i) onepass::copy_pages(layer(i), copies);
  }

  void fork(std::int64_t source, std::int64_t target) { pool().fork(source, target); }
  std::int64_t free_pages() { return pool().free_pages(); }
  std::int64_t sequences() const { return static_cast<std::int64_t>(seqlens_.size()); }

 private:
  struct Shape {
    std::int64_t blocks, tokens;
  };

  std::int64_t max_pages() const { return kMaxTokens / page_size_; }
  onepass::PagePool pool() {
    const onepass::KVCacheView view = layer(0);
    const auto pages = static_cast<std::int64_t>(references_.size());
    return {view.page_table, view.seqlens, TensorView(references_.data(), DType::kInt32, {pages}), page_size_};
  }

  std::int64_t page_size_;
  Shape shape_;
  std::vector<std::int32_t> seqlens_, table_, references_;
  std::vector<Floats> keys_, values_;
};

using Tokens = std::vector<int>;

// Runs the new tokens of every sequence (many in prefill, one in decode, none for one that rests: any mix) and returns
// the likeliest next token of each.
Tokens step(const Model& model, Store& store, const std::vector<Tokens>& new_tokens) {
  std::vector<std::int64_t> counts;
  std::vector<std::int32_t> bounds{0};
  Floats x;
  for (const Tokens& tokens : new_tokens) {
    counts.push_back(static_cast<std::int64_t>(tokens.size()));
    bounds.push_back(bounds.back() + static_cast<std::int32_t>(tokens.size()));
    for (int token : tokens) {
      const auto row = model.embedding.begin() + token * kWidth;
      x.insert(x.end(), row, row + kWidth);
    }
  }
  const std::int64_t total = bounds.back();
  store.reserve(counts);

  for (std::int64_t i = 0; i < kLayers; ++i) {
    const Layer& layer = model.layers[i];
    const Floats h = normalized(x);
    Floats q = layer.q(h), k = layer.k(h), v = layer.v(h), attended(q.size());
    const auto packed = [total](Floats& data, std::int64_t heads) {
      return TensorView(data.data(), DType::kFloat32, {total, heads, kHeadDim});
    };
    const auto table = [](const Floats& data) {
      return TensorView(const_cast<float*>(data.data()), DType::kFloat32, {kMaxTokens, kHeadDim / 2});
    };
    // Stores the new keys and values and attends over all, with rotary positions on the way.
    onepass::cached_attention(packed(q, kHeads), store.layer(i), {.out = packed(attended, kHeads)},
                              {.cu_seqlens_q = TensorView(bounds.data(), DType::kInt32, {store.sequences() + 1}),
                               .k_new = packed(k, kHeadsKv),
                               .v_new = packed(v, kHeadsKv),
                               .advance = i == kLayers - 1,  // lengths are shared, so the last layer counts the tokens
                               .rotary = {.cos = table(model.cosines), .sin = table(model.sines)}});
    add(x, layer.o(attended));
    Floats hidden = layer.up(normalized(x));
    for (float& value : hidden) value /= 1.0f + std::exp(-value);
    add(x, layer.down(hidden));
  }

  const Floats logits = model.head(normalized(x));
  Tokens next;
  for (std::int64_t b = 0; b < store.sequences(); ++b) {
    const auto row = logits.begin() + (bounds[b + 1] - 1) * kVocabulary;
    next.push_back(counts[b] == 0 ? -1 : static_cast<int>(std::max_element(row, row + kVocabulary) - row));
  }
  return next;
}

Tokens bytes(std::string_view text) { return {text.begin(), text.end()}; }

// Prefills, then decodes `count` tokens greedily; returns what each sequence got.
std::vector<Tokens> generate(const Model& model, Store& store, std::vector<Tokens> input, int count) {
  std::vector<Tokens> output(input.size());
  for (int i = 0; i < count; ++i) {
    const Tokens next = step(model, store, input);
    for (std::size_t b = 0; b < input.size(); ++b) {
      input[b].clear();
      if (next[b] < 0) continue;
      output[b].push_back(next[b]);
      input[b].push_back(next[b]);
    }
  }
  return output;
}

void print(const char* what, const Tokens& tokens) {
  std::printf("%-22s", what);
  for (int token : tokens) std::printf(" %d", token);
  std::printf("\n");
}

}  // namespace

int main() {
  const Model model(7);
  const Tokens first = bytes("Attention over keys and values"), second = bytes("in one pass");
  constexpr int kNew = 16;

  Store contiguous(2, 0);
  const std::vector<Tokens> want = generate(model, contiguous, {first, second}, kNew);
  print("contiguous, prompt 1:", want[0]);
  print("contiguous, prompt 2:", want[1]);

  Store paged(2, /*page_size=*/4, /*num_pages=*/40);
  const std::vector<Tokens> pages = generate(model, paged, {first, second}, kNew);
  print("pages of 4, prompt 1:", pages[0]);
  print("pages of 4, prompt 2:", pages[1]);

  // Sequence 1 begins as a copy of sequence 0's prompt, shares its pages, and goes on with another token.
  Store shared(2, 4, 40);
  const Tokens next = step(model, shared, {first, {}});
  const std::int64_t before = shared.free_pages();
  shared.fork(0, 1);
  const bool costs_nothing = shared.free_pages() == before;
  const std::vector<Tokens> forked = generate(model, shared, {{next[0]}, {'?'}}, kNew - 1);
  print("shared prefix, as is:", forked[0]);
  print("shared prefix, \"?\":", forked[1]);
  std::printf("pages free: %lld after the prompt, %lld in the end\n", static_cast<long long>(before),
              static_cast<long long>(shared.free_pages()));

  // No decoding at all: everything before the last token as one prompt.
  Tokens all = first;
  all.insert(all.end(), want[0].begin(), want[0].end() - 1);
  Store again(1, 0);
  const bool prefill_agrees = step(model, again, {all})[0] == want[0].back();

  const bool same = pages == want && costs_nothing && prefill_agrees &&
                    std::equal(forked[0].begin(), forked[0].end(), want[0].begin() + 1);
  std::printf("%s\n", same ? "the same tokens each way" : "TOKENS DIFFER");
  return same ? 0 : 1;
}
