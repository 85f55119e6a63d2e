// Stands in for libFuzzer where the compiler has none: `replay KIND [COUNT]` feeds
// LLVMFuzzerTestOneInput COUNT deterministic mutations of the seeds for KIND (header, index, json),
// `replay FILE...` feeds files. Any exception but Error, any signal and any allocation that takes
// the live total above 64 MiB ends the program.
#include <malloc.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

#include <new>
#include <random>
#include <string>
#include <vector>

#include "support/checkpoint_maker.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr size_t kMaxBytes = 64 << 20;
size_t live_bytes = 0;  // counted by the operators below, which have no other place to keep it

}  // namespace

void* operator new(size_t bytes) {
  if (bytes > kMaxBytes || live_bytes + bytes > kMaxBytes) {
    std::fprintf(stderr, "allocation of %zu bytes with %zu alive\n", bytes, live_bytes);
    std::abort();
  }
  void* pointer = std::malloc(bytes);
  if (pointer == nullptr) throw std::bad_alloc();
  live_bytes += malloc_usable_size(pointer);
  return pointer;
}
void operator delete(void* pointer) noexcept {
  if (pointer != nullptr) live_bytes -= malloc_usable_size(pointer);
  std::free(pointer);
}
void operator delete(void* pointer, size_t) noexcept {
  operator delete(pointer);
}

namespace bitmill::testing {
namespace {

using Random = std::mt19937_64;

std::vector<std::string> header_seeds() {
  const RawTensor a = random_tensor("model.layers.0.mlp.up_proj.weight", "BF16", {4, 6});
  const RawTensor b = random_tensor("model.norm.weight", "F32", {8});
  const RawTensor empty{"empty", "U8", {0, 3}, ""};
  std::string with_metadata = safetensors_header({b});
  with_metadata.insert(1, R"("__metadata__":{"format":"pt","k\u00e9y":"v"},)");
  return {
      safetensors_bytes({a, b, empty}), safetensors_bytes(with_metadata + "   ", b.bytes),
      safetensors_bytes("{}", ""),
      safetensors_bytes(
          R"({"w":{"dtype":"U8","shape":[4194305,4194305,211106198978564],"data_offsets":[0,4]}})",
          "1234"),
      safetensors_bytes(R"({"w":{"dtype":"F4","shape":[2,2],"data_offsets":[0,2]}})", "12")};
}

std::vector<std::string> index_seeds() {
  return {R"({"metadata":{"total_size":12},"weight_map":)"
          R"({"a":"model-00001-of-00002.safetensors","b":"x.safetensors"}})",
          R"({"weight_map":{"a":"../x.safetensors","b":"/etc/passwd"}})", R"({"weight_map":{}})"};
}

std::vector<std::string> json_seeds() {
  return {R"({"a":[1,-2,2.5e3,true,false,null,"x\u00e9\ud83d\ude00\n"],"b":{"c":{"d":[[[]]]}},)"
          R"("big":18446744073709551615})",
          std::string(70, '[') + std::string(70, ']'),
          R"({"rope_scaling":{"factor":8.0,"type":"llama3"},"x":"\\"})"};
}

// Pieces that matter to the readers: a blind byte flip rarely makes one.
const std::vector<std::string>& tokens() {
  static const std::vector<std::string> list = {"{",
                                                "}",
                                                "[",
                                                "]",
                                                "\"",
                                                ":",
                                                ",",
                                                " ",
                                                "\n",
                                                std::string(1, '\0'),
                                                "\\u0000",
                                                "\xff",
                                                "-1",
                                                "-0",
                                                "1e3",
                                                "0",
                                                "4.0",
                                                "18446744073709551616",
                                                "281474976710655",
                                                "9223372036854775807",
                                                "null",
                                                "true",
                                                "\"dtype\":",
                                                "\"shape\":",
                                                "\"data_offsets\":",
                                                "\"F64\"",
                                                "\"F6_E2M3\"",
                                                "\"__metadata__\":",
                                                "[0,0]",
                                                "../",
                                                ".safetensors",
                                                "[[[[[[[["};
  return list;
}

size_t below(Random& random, size_t bound) {
  return bound == 0 ? 0 : random() % bound;
}

void mutate_once(std::string& text, Random& random) {
  const size_t at = below(random, text.size() + 1);
  switch (below(random, 7)) {
    case 0:
      if (at < text.size()) text[at] = static_cast<char>(random());
      break;
    case 1:
      if (at < text.size()) text[at] = static_cast<char>(text[at] ^ (1 << below(random, 8)));
      break;
    case 2:
      text.erase(at, 1 + below(random, 9));
      break;
    case 3:
      text.insert(at, tokens()[below(random, tokens().size())]);
      break;
    case 4: {  // replaces by a token of its own
      const std::string& token = tokens()[below(random, tokens().size())];
      text.replace(at, std::min(token.size(), text.size() - at), token);
      break;
    }
    case 5:
      text.insert(at, text.substr(below(random, text.size() + 1), 1 + below(random, 60)));
      break;
    default:
      if (below(random, 8) == 0) text.resize(at);
      break;
  }
}

// Half of the mutated files get a length prefix that fits again, so that the text behind it is
// reached.
void fix_length(std::string& bytes, Random& random) {
  if (bytes.size() < 8 || below(random, 2) == 0) return;
  const size_t brace = bytes.rfind("}}");
  if (brace == std::string::npos || brace < 8) return;
  const uint64_t length = brace + 2 - 8;
  std::memcpy(bytes.data(), &length, 8);
}

void feed(const std::string& text) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(text.data()), text.size());
}

int replay(const std::string& kind, int count) {
  const auto seeds = kind == "header"  ? header_seeds()
                     : kind == "index" ? index_seeds()
                                       : json_seeds();
  for (const std::string& seed : seeds) feed(seed);
  Random random(20240501);
  for (int i = 0; i < count; ++i) {
    std::string text = seeds[below(random, seeds.size())];
    for (size_t edits = 1 + below(random, 4); edits > 0; --edits) mutate_once(text, random);
    if (kind == "header") fix_length(text, random);
    feed(text);
  }
  std::printf("%d inputs of kind %s\n", count, kind.c_str());
  return 0;
}

}  // namespace
}  // namespace bitmill::testing

int main(int argc, char** argv) {
  const std::string kind = argc > 1 ? argv[1] : "";
  if (kind == "header" || kind == "index" || kind == "json")
    return bitmill::testing::replay(kind, argc > 2 ? std::atoi(argv[2]) : 10'000);
  for (int i = 1; i < argc; ++i) bitmill::testing::feed(bitmill::testing::read_bytes(argv[i]));
  return argc > 1 ? 0 : 2;
}
