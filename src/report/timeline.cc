#include <algorithm>

#include "report/report.h"

namespace bitmill {
namespace {

constexpr int kCells = 80;
constexpr size_t kMostLines = 32;
constexpr std::string_view kLetters = "RCSAXTW.-";  // one per Activity
static_assert(kLetters.size() == kActivities);

// Each cell is the letter of what took most of its slice; blank where nothing is known.
std::string cells_of(const RankSummary& rank, double seconds) {
  const double slice = seconds / kCells;
  std::array<std::array<double, kActivities>, kCells> inside{};
  for (const Span& span : rank.spans) {
    const int first = std::clamp(static_cast<int>(span.start / slice), 0, kCells - 1);
    const int last = std::clamp(static_cast<int>(span.end / slice), first, kCells - 1);
    for (int cell = first; cell <= last; ++cell) {
      const double start = std::max(span.start, cell * slice);
      const double end = std::min(span.end, (cell + 1) * slice);
      inside[static_cast<size_t>(cell)][static_cast<size_t>(span.what)] +=
          std::max(0.0, end - start);
    }
  }
  std::string cells;
  for (const auto& seconds_of : inside) {
    const auto most = std::max_element(seconds_of.begin(), seconds_of.end());
    cells += *most > 0 ? kLetters[static_cast<size_t>(most - seconds_of.begin())] : ' ';
  }
  return cells;
}

std::string legend(const std::string& lines) {
  std::string text;
  for (int i = 0; i < kActivities; ++i) {
    const char letter = kLetters[static_cast<size_t>(i)];
    if (lines.find(letter) == std::string::npos) continue;
    text += fmt::format("{}{} {}", text.empty() ? "" : ", ", letter,
                        activity_name(static_cast<Activity>(i)));
  }
  return text;
}

}  // namespace

std::string timeline_text(const std::vector<RankSummary>& ranks) {
  std::vector<const RankSummary*> list;
  double seconds = 0;
  for (const RankSummary& rank : ranks) {
    if (rank.spans.empty() || rank.end_block == rank.first_block) continue;
    list.push_back(&rank);
    seconds = std::max(seconds, rank.spans.back().end);
  }
  if (list.size() < 2 || seconds == 0) return "";
  const size_t lines = std::min(list.size(), kMostLines);
  std::string letters, text;
  for (size_t i = 0; i < lines; ++i) {
    const RankSummary& rank = *list[i * list.size() / lines];
    const std::string cells = cells_of(rank, seconds);
    letters += cells;
    text += fmt::format("\n{:>6} |{}|", rank.rank, cells);
  }
  return fmt::format("timeline of {}, {} a letter{}: {}", human_seconds(seconds),
                     human_seconds(seconds / kCells),
                     lines < list.size() ? fmt::format(", {} of {} ranks", lines, list.size()) : "",
                     legend(letters)) +
         text;
}

Json timeline_json(const std::vector<RankSummary>& ranks) {
  Json json = Json::array();
  for (const RankSummary& rank : ranks)
    for (const Span& span : rank.spans)
      json.push_back({{"rank", rank.rank},
                      {"what", activity_name(span.what)},
                      {"block", span.block},
                      {"start", span.start},
                      {"end", span.end}});
  return json;
}

}  // namespace bitmill
