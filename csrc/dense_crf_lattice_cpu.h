// Filtering the pixels of an image on a permutohedral lattice: splat, blur along d+1 directions, slice.
//
//   Tiles     the image in squares; everything per pixel is kept in the order of the tiles
//   Lattice   a tile's own vertices, numbered from 0, so that splatting touches memory that stays in the cache;
//             the image's vertices, with the copies that tiles hold of each; the chains that the blur walks
//
// Splatting is a sum over the pixels of a tile into the tile's own copies, then over the copies of a vertex in the order
// of the tiles: no two threads write one number, and the order of additions does not depend on the threads.
#pragma once

#include <utility>

#include "common/tensors.h"
#include "common/vec.h"
#include "dense_crf.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

struct Tiles {
  static constexpr int64_t kSide = 64;

  int64_t H, W, columns, count;

  Tiles(int64_t H, int64_t W)
      : H(H), W(W), columns((W + kSide - 1) / kSide), count((H + kSide - 1) / kSide * columns) {}

  struct Tile {
    int64_t y, x, height, width;  // in the image
    int64_t begin;                // the place of its first pixel among all, in the order of the tiles
    int64_t pixels() const { return height * width; }
  };
  Tile operator[](int64_t t) const {
    const int64_t y = t / columns * kSide, x = t % columns * kSide;
    const int64_t height = std::min(kSide, H - y), width = std::min(kSide, W - x);
    return {y, x, height, width, y * W + x * height};
  }
};

// Keys to numbers 0, 1, .. in the order of their first appearance. Open addressing, at most half full.
class KeyNumbers {
 public:
  std::vector<int64_t> keys;

  explicit KeyNumbers(int64_t expected = 1024) {
    int bits = 4;
    while ((int64_t(1) << bits) < 2 * expected) ++bits;
    resize(bits);
  }
  int32_t insert(int64_t key) {
    Slot& slot = find(key);
    if (slot.number >= 0) return slot.number;
    const int32_t number = int32_t(keys.size());
    slot = {key, number};
    keys.push_back(key);
    if (2 * keys.size() > slots_.size()) grow();
    return number;
  }
  // -1 where there is none
  int32_t operator[](int64_t key) const { return const_cast<KeyNumbers*>(this)->find(key).number; }
  // Forgets the keys, keeps the room.
  void clear() {
    for (int64_t key : keys) place(key).number = -1;
    keys.clear();
  }

 private:
  struct Slot {
    int64_t key;
    int32_t number;
  };

  // Multiplied by the golden ratio, of which the upper bits count: equal distances of keys are spread evenly.
  uint64_t first(int64_t key) const { return (uint64_t(key) * 0x9e3779b97f4a7c15u) >> shift_; }
  Slot& find(int64_t key) {
    uint64_t i = first(key);
    while (slots_[i].number >= 0 && slots_[i].key != key) i = (i + 1) & (slots_.size() - 1);
    return slots_[i];
  }
  // As find for a key that is there, while others have been taken out already.
  Slot& place(int64_t key) {
    uint64_t i = first(key);
    while (slots_[i].key != key) i = (i + 1) & (slots_.size() - 1);
    return slots_[i];
  }
  void resize(int bits) {
    shift_ = 64 - bits;
    slots_.assign(size_t(1) << bits, Slot{kNoKey, -1});
  }
  void grow() {
    resize(65 - shift_);
    for (size_t i = 0; i < keys.size(); ++i) find(keys[i]) = {keys[i], int32_t(i)};
  }

  static constexpr int64_t kNoKey = INT64_MIN;
  int shift_;
  std::vector<Slot> slots_;
};

template <class T, int d>
class Lattice {
 public:
  static constexpr int kCorners = d + 1;

  int64_t vertices = 0;  // of the image
  int64_t copies = 0;    // of them in the tiles, all together

  // `features(y, x, out)` writes the d features of a pixel.
  template <class Features>
  Lattice(const Tiles& tiles, const LatticeMap<d>& map, const Features& features)
      : corner_(tiles.H * tiles.W * kCorners),
        weight_(tiles.H * tiles.W * kCorners),
        first_copy_(tiles.count + 1, true) {
    std::vector<std::vector<int64_t>> keys(tiles.count);
    torch::stable::parallel_for(0, tiles.count, 1, [&](int64_t begin, int64_t end) {
      KeyNumbers numbers;
      for (int64_t t = begin; t < end; ++t) {
        splat_structure(tiles[t], map, features, numbers);
        keys[t] = numbers.keys;
        numbers.clear();
      }
    });
    KeyNumbers numbers(4096);
    number_vertices(keys, numbers);
    blur_structure(map, numbers);
  }

  // Scales pixel p's weights in splat and slice.
  void scale(int64_t p, T factor) {
    for (int k = 0; k < kCorners; ++k) weight_[p * kCorners + k] *= factor;
  }

  // The tile's copies within a buffer of `copies` rows of values, set to zero.
  T* cleared_copies(int64_t tile, int64_t columns, T* partial) const {
    T* own = partial + first_copy_[tile] * columns;
    std::fill_n(own, (first_copy_[tile + 1] - first_copy_[tile]) * columns, T(0));
    return own;
  }
  // Adds pixel p's values q to its tile's copies of its vertices.
  template <class Columns>
  void splat(int64_t p, Columns columns, const T* q, T* own) const {
    const T* w = &weight_[p * kCorners];
    const uint16_t* corner = &corner_[p * kCorners];
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      const Vec<T> x = load<T>(q + c);
      for (int k = 0; k < kCorners; ++k) {
        T* v = own + corner[k] * int64_t(columns) + c;
        store<T>(v, load<T>(v) + w[k] * x);
      }
    }
  }
  // out += factor * the values at pixel p of the given tile
  template <class Columns>
  void slice(int64_t p, int64_t tile, Columns columns, T factor, const T* values, T* out) const {
    const int32_t* vertex = vertex_of_copy_.get() + first_copy_[tile];
    const T* w = &weight_[p * kCorners];
    const uint16_t* corner = &corner_[p * kCorners];
    const T* v[kCorners];
    for (int k = 0; k < kCorners; ++k) v[k] = values + vertex[corner[k]] * int64_t(columns);
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      Vec<T> sum = w[0] * load<T>(v[0] + c);
      for (int k = 1; k < kCorners; ++k) sum += w[k] * load<T>(v[k] + c);
      store<T>(out + c, load<T>(out + c) + factor * sum);
    }
  }
  // values [vertices][columns]: each the sum of its copies, then blurred. In the columns [first, first + width) alone;
  // in threads, unless the caller is in one.
  template <class Width>
  void gather_and_blur(int64_t columns, int64_t first, Width width, const T* partial, T* values) const {
    partial += first, values += first;
    torch::stable::parallel_for(0, vertices, 512, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        T* sum = values + v * columns;
        std::copy_n(partial + copy_[copies_begin_[v]] * columns, int64_t(width), sum);
        for (int64_t i = copies_begin_[v] + 1; i < copies_begin_[v + 1]; ++i) {
          const T* other = partial + copy_[i] * columns;
          for (int64_t c = 0; c < width; c += kLanes<T>)
            store<T>(sum + c, load<T>(sum + c) + load<T>(other + c));
        }
      }
    });
    for (const Chains& chains : chains_)
      torch::stable::parallel_for(0, int64_t(chains.begin.size()) - 1, 64, [&](int64_t begin, int64_t end) {
        PixelScratch<T, Width> before(width);
        for (int64_t i = begin; i < end; ++i)
          blur_chain(&chains.vertex[chains.begin[i]], chains.begin[i + 1] - chains.begin[i], columns, width,
                     values, before.get());
      });
  }

 private:
  // The vertices along one direction of the blur that have neighbours there, run after run.
  struct Chains {
    std::vector<int32_t> vertex;
    std::vector<int64_t> begin;
  };

  template <class Features>
  void splat_structure(const Tiles::Tile& tile, const LatticeMap<d>& map, const Features& features,
                       KeyNumbers& numbers) {
    static_assert(Tiles::kSide * Tiles::kSide * kCorners <= 65536,
                  "a tile's vertices are numbered in 16 bits");
    double feature[d];
    int64_t p = tile.begin * kCorners;
    for (int64_t y = 0; y < tile.height; ++y)
      for (int64_t x = 0; x < tile.width; ++x, p += kCorners) {
        features(tile.y + y, tile.x + x, feature);
        const Simplex<d> simplex = find_simplex<d>(map, feature);
        for (int k = 0; k < kCorners; ++k) {
          corner_[p + k] = uint16_t(numbers.insert(simplex.key[k]));
          weight_[p + k] = T(simplex.weight[k]);
        }
      }
  }

  void number_vertices(const std::vector<std::vector<int64_t>>& keys, KeyNumbers& numbers) {
    const int64_t tiles = keys.size();
    for (int64_t t = 0; t < tiles; ++t) first_copy_[t + 1] = first_copy_[t] + int64_t(keys[t].size());
    copies = first_copy_[tiles];
    STD_TORCH_CHECK(copies < (int64_t(1) << 31),
                    "dense_crf: images must be of fewer than 2^31 lattice vertices");
    vertex_of_copy_.reset(copies);
    for (int64_t t = 0, i = 0; t < tiles; ++t)
      for (int64_t key : keys[t]) vertex_of_copy_[i++] = numbers.insert(key);
    vertices = numbers.keys.size();
    copies_begin_.reset(vertices + 1, true);
    copy_.reset(copies);
    for (int64_t i = 0; i < copies; ++i) ++copies_begin_[vertex_of_copy_[i] + 1];
    for (int64_t v = 0; v < vertices; ++v) copies_begin_[v + 1] += copies_begin_[v];
    std::vector<int64_t> next(copies_begin_.get(), copies_begin_.get() + vertices);
    for (int64_t i = 0; i < copies; ++i) copy_[next[vertex_of_copy_[i]]++] = int32_t(i);
  }

  void blur_structure(const LatticeMap<d>& map, const KeyNumbers& numbers) {
    torch::stable::parallel_for(0, kCorners, 1, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> next(vertices);
      std::vector<char> has_previous(vertices);
      for (int64_t j = begin; j < end; ++j) {
        std::fill(has_previous.begin(), has_previous.end(), 0);
        for (int64_t v = 0; v < vertices; ++v) {
          next[v] = numbers[numbers.keys[v] + map.step(int(j))];
          if (next[v] >= 0) has_previous[next[v]] = 1;
        }
        Chains& chains = chains_[j];
        for (int64_t v = 0; v < vertices; ++v) {
          if (has_previous[v] || next[v] < 0) continue;
          chains.begin.push_back(chains.vertex.size());
          for (int32_t i = int32_t(v); i >= 0; i = next[i]) chains.vertex.push_back(i);
        }
        chains.begin.push_back(chains.vertex.size());
      }
    });
  }

  // lattice_blur in place. `before` holds what the previous vertex was.
  template <class Width>
  static void blur_chain(const int32_t* vertex, int64_t n, int64_t columns, Width width, T* values,
                         T* before) {
    std::fill_n(before, int64_t(width), T(0));
    for (int64_t i = 0; i < n; ++i) {
      T* v = values + vertex[i] * columns;
      const T* after = i + 1 < n ? values + vertex[i + 1] * columns : nullptr;
      for (int64_t c = 0; c < width; c += kLanes<T>) {
        const Vec<T> here = load<T>(v + c);
        const Vec<T> sum = after ? load<T>(before + c) + load<T>(after + c) : load<T>(before + c);
        store<T>(before + c, here);
        store<T>(v + c, lattice_blur<T>(here, sum));
      }
    }
  }

  Buffer<uint16_t> corner_;     // [pixels][d+1], a number among the tile's copies
  Buffer<T> weight_;            // [pixels][d+1]
  Buffer<int64_t> first_copy_;  // [tiles+1]
  Buffer<int32_t> vertex_of_copy_;
  Buffer<int64_t> copies_begin_;  // [vertices+1]
  Buffer<int32_t> copy_;          // [copies], of each vertex in turn in the order of the tiles
  Chains chains_[kCorners];
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
