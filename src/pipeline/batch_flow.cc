#include "pipeline/batch_flow.h"

namespace bitmill {

BatchReceiver::BatchReceiver(Transport& transport, int from, Backend& backend, std::vector<BatchRange> ranges,
                             int64_t length, int64_t hidden, int streams)
    : transport_(transport),
      from_(from),
      backend_(backend),
      ranges_(std::move(ranges)),
      length_(length),
      hidden_(hidden),
      streams_(static_cast<size_t>(streams)) {}

void BatchReceiver::post() {
  const BatchRange& range = ranges_[posted_ / streams_];
  Arriving next{Tensor(backend_.compute(), {range.samples * length_, hidden_}), nullptr};
  next.transfer = transport_.start_receive(next.host, from_);
  arriving_.push_back(std::move(next));
  ++posted_;
}

MicroBatch BatchReceiver::receive() {
  while (posted_ < ranges_.size() * streams_ && arriving_.size() <= kBatchesInFlight) post();
  BITMILL_CHECK(!arriving_.empty());
  Arriving next = std::move(arriving_.front());
  arriving_.pop_front();
  next.transfer->wait();
  MicroBatch batch;
  batch.sequences = ranges_[received_++ / streams_].samples;
  batch.length = length_;
  batch.hidden = backend_.upload(std::move(next.host));
  return batch;
}

void BatchSender::send(Tensor hidden) {
  while (!leaving_.empty() && (leaving_.size() >= kBatchesInFlight || leaving_.front().transfer->done())) {
    leaving_.front().transfer->wait();
    leaving_.pop_front();
  }
  Leaving next{backend_.download(std::move(hidden)), nullptr};
  next.transfer = transport_.start_send(next.host, to_);
  leaving_.push_back(std::move(next));
}

void BatchSender::finish() {
  for (Leaving& leaving : leaving_) leaving.transfer->wait();
  leaving_.clear();
}

}  // namespace bitmill
