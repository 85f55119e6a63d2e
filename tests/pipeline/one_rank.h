// A stage of one rank, for tests of what works on blocks.
#pragma once

#include "comm/transport.h"
#include "pipeline/block_context.h"

namespace bitmill::testing {

// Everything a BlockContext refers to, kept alive. Records of finished linears are in `records`.
struct OneRank {
  OneRank(const RunOptions& options, const ModelSource& source, const OutputFormat& format,
          Backend& backend)
      : comm(Communicator::start(nullptr, nullptr)),
        transport(make_transport("auto", comm)),
        group(*transport, backend),
        context{options, source, format, backend, group, phases,
                [this](const QuantizeRecord& record) { records.push_back(record); },
                nullptr,
                nullptr} {}

  Communicator comm;
  std::unique_ptr<Transport> transport;
  StageGroup group;
  RankClock phases;
  std::vector<QuantizeRecord> records;
  BlockContext context;
};

}  // namespace bitmill::testing
