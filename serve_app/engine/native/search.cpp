// Choosing the next tokens: greedy and beam search, as `generate()` of transformers 5 chooses them
// (GenerationMixin._sample, ._beam_search and the logits processors), so that with float32 weights
// the outputs are equal token for token.

#include "search.h"

namespace t5 {

constexpr float kUnlikely = -1e9f;  // `generate()`'s score of a beam that is not there

static void ban_repeats(const int32_t* history, int length, int size, float* scores) {
    if (length < size) return;
    const int32_t* tail = history + length - (size - 1);
    for (int start = 0; start + size <= length; ++start)
        if (std::equal(tail, history + length, history + start))
            scores[history[start + size - 1]] = kNever;
}

static void only(int token, float* scores, int vocabulary) {
    std::fill(scores, scores + vocabulary, kNever);
    scores[token] = 0;
}

// What the settings make of a row's scores, in the order in which transformers does it. `length`
// counts the start token.
static void process(const Search& search, int document, const int32_t* history, int length,
                    float* scores) {
    const float penalty = search.repetition_penalty[document];
    if (penalty != 1.0f)
        for (int i = 0; i < length; ++i) {
            if (std::find(history, history + i, history[i]) != history + i) continue;
            float& score = scores[history[i]];
            score = score < 0 ? score * penalty : score / penalty;
        }
    if (search.ngram[document]) ban_repeats(history, length, search.ngram[document], scores);
    if (length - 1 < search.least[document]) scores[search.eos] = kNever;
    if (search.forced_first >= 0 && length == 1)
        only(search.forced_first, scores, search.vocabulary);
    if (search.forced_last >= 0 && length == search.most[document])
        only(search.forced_last, scores, search.vocabulary);
    for (int i = 0; i < search.suppressed_count; ++i) scores[search.suppressed[i]] = kNever;
    const int begin = search.forced_first >= 0 ? 2 : 1;
    if (length == begin)
        for (int i = 0; i < search.begin_suppressed_count; ++i)
            scores[search.begin_suppressed[i]] = kNever;
}

static int likeliest(const float* scores, int count) {
    Floats top = broadcast(kNever);
    int i = 0;
    for (; i + kVector <= count; i += kVector) top = max(top, load(scores + i));
    float best = max(top);
    for (; i < count; ++i) best = std::fmax(best, scores[i]);
    return int(std::find(scores, scores + count, best) - scores) % count;
}

static void log_softmax(float* scores, int count) {
    const float most = *std::max_element(scores, scores + count);
    Floats total{};
    int i = 0;
    for (; i + kVector <= count; i += kVector) total += exponential(load(scores + i) - most);
    double whole = sum(total);
    for (; i < count; ++i) whole += std::exp(scores[i] - most);
    const float log = float(std::log(whole));
    for (i = 0; i + kVector <= count; i += kVector)
        store(scores + i, load(scores + i) - most - log);
    for (; i < count; ++i) scores[i] = scores[i] - most - log;
}

struct Candidate {
    float total;
    int32_t beam, token;
};

static bool above(const Candidate& a, const Candidate& b) { return a.total > b.total; }

// The `wanted` best of scores + base, best first.
static void best_of(const float* scores, int count, float base, int beam, int wanted,
                    std::vector<Candidate>& to) {
    to.clear();
    float bar = kNever;  // what a token must exceed once there are enough
    const auto offer = [&](int token) {
        const float total = scores[token] + base;
        const bool full = to.size() == size_t(wanted);
        if (full && !(total > bar)) return;
        const Candidate candidate{total, beam, token};
        if (full) to.pop_back();
        to.insert(std::upper_bound(to.begin(), to.end(), candidate, above), candidate);
        if (to.size() == size_t(wanted)) bar = to.back().total;
    };
    int token = 0;
    for (; token < std::min(wanted, count); ++token) offer(token);
    for (; token + kVector <= count; token += kVector) {
        if (!(max(load(scores + token)) + base > bar)) continue;
        for (int i = 0; i < kVector; ++i) offer(token + i);
    }
    for (; token < count; ++token) offer(token);
}

static void greedy(const Search& search, int document, const int32_t* chosen, int rows,
                   int32_t* made, uint8_t* done) {
    int32_t* tokens =
        search.tokens + search.lanes[document * search.most_beams] * search.stride;
    int32_t& steps = search.steps[document];
    const int before = steps;
    *done = 0;
    for (int row = 0; row < rows; ++row) {
        const int32_t drafted = tokens[steps + 1];  // of no meaning behind the last row
        tokens[++steps] = chosen[row];
        *done = chosen[row] == search.eos || steps >= search.most[document];
        if (*done || drafted != chosen[row]) break;
    }
    *made = steps - before;
}

struct BeamRoom {
    std::vector<Candidate> candidates;
    std::vector<int32_t> tokens, ancestry, order, steps;
    std::vector<float> running, scores;
    std::vector<uint8_t> done;
};

template <class Values> static void rank(const Values& values, int count, std::vector<int32_t>& to) {
    to.resize(count);
    for (int i = 0; i < count; ++i) to[i] = i;
    std::stable_sort(to.begin(), to.end(), [&](int a, int b) { return values[a] > values[b]; });
}

// One document's beams, from the candidates of all of them.
static uint8_t beam(const Search& search, int document, BeamRoom& room) {
    const int beams = search.beams[document], wide = 2 * beams;
    const int32_t* lanes = search.lanes + document * search.most_beams;
    const int generated = ++search.steps[document];
    const int64_t length = generated + 1;
    const bool last = generated >= search.most[document];
    auto& candidates = room.candidates;
    std::stable_sort(candidates.begin(), candidates.end(), above);
    // Twice as many as beams: even if every beam's best is the end token, enough go on.
    candidates.resize(wide);
    const auto ends = [&](int i) { return candidates[i].token == search.eos || last; };

    // Finished hypotheses first, while the running ones still have their old tokens.
    const float scale = float(std::pow(double(generated), search.length_penalty[document]));
    bool all_done = true, all_end = true;
    for (int b = 0; b < beams; ++b) all_done &= search.best_done[lanes[b]];
    const bool early = search.early[document];
    bool improvable = search.improvable[document];
    room.scores.clear(), room.steps.clear(), room.done.clear();
    for (int b = 0; b < beams; ++b) {
        room.scores.push_back(search.best_scores[lanes[b]]);
        room.steps.push_back(search.best_steps[lanes[b]]);
        room.done.push_back(search.best_done[lanes[b]]);
    }
    for (int i = 0; i < wide; ++i) {
        const bool finished = ends(i) && i < beams;
        float score = candidates[i].total / scale;
        if (all_done && early) score += kUnlikely;
        if (!improvable) score += kUnlikely;
        if (!finished) score += kUnlikely;
        room.scores.push_back(score), room.steps.push_back(generated), room.done.push_back(finished);
        all_end &= ends(i);
    }
    rank(room.scores, 3 * beams, room.order);
    room.tokens.resize(beams * length);
    for (int b = 0; b < beams; ++b) {
        const int from = room.order[b];
        int32_t* to = room.tokens.data() + b * length;
        if (from < beams) {
            std::copy_n(search.best_tokens + lanes[from] * search.stride, length, to);
        } else {
            const Candidate& candidate = candidates[from - beams];
            std::copy_n(search.tokens + lanes[candidate.beam] * search.stride, length - 1, to);
            to[length - 1] = candidate.token;
        }
    }
    float worst = std::numeric_limits<float>::infinity();
    bool any_done = false;
    all_done = true;
    for (int b = 0; b < beams; ++b) {
        const int from = room.order[b], lane = lanes[b];
        std::copy_n(room.tokens.data() + b * length, length,
                    search.best_tokens + lane * search.stride);
        search.best_scores[lane] = room.scores[from];
        search.best_steps[lane] = room.steps[from];
        search.best_done[lane] = room.done[from];
        worst = std::fmin(worst, room.scores[from]);
        all_done &= room.done[from], any_done |= room.done[from];
    }

    // The running hypotheses.
    room.running.resize(wide);
    for (int i = 0; i < wide; ++i)
        room.running[i] = candidates[i].total + (ends(i) ? kUnlikely : 0.0f);
    rank(room.running, wide, room.order);
    room.ancestry.resize(beams * length);
    for (int b = 0; b < beams; ++b) {
        const Candidate& from = candidates[room.order[b]];
        const int64_t lane = lanes[from.beam];
        std::copy_n(search.tokens + lane * search.stride, length - 1,
                    room.tokens.data() + b * length);
        room.tokens[b * length + length - 1] = from.token;
        int32_t* ancestry = room.ancestry.data() + b * length;
        std::copy_n(search.ancestry + lane * search.stride, length - 2, ancestry);
        ancestry[length - 2] = int32_t(lane);  // who wrote the key of this step
    }
    for (int b = 0; b < beams; ++b) {
        const int64_t at = lanes[b] * search.stride;
        std::copy_n(room.tokens.data() + b * length, length, search.tokens + at);
        std::copy_n(room.ancestry.data() + b * length, length - 1, search.ancestry + at);
        search.scores[lanes[b]] = room.running[room.order[b]];
    }
    const float possible = search.scores[lanes[0]] / scale;
    const bool beats_one = (any_done && possible > worst) || (!all_done && possible > kUnlikely);
    improvable = improvable && beats_one;
    search.improvable[document] = improvable;
    return !improvable || (all_done && early) || all_end;
}

}  // namespace t5

using namespace t5;

extern "C" {

// Lay out the rows of a step; returns how many. drafts: (documents, most_drafts) tokens to try
// behind a greedy document's newest one, drafted: how many of them.
int t5_begin(const Search* search, const Rows* rows, int documents, const int32_t* active,
             const int32_t* drafts, const int32_t* drafted, int most_drafts) {
    int row = 0;
    const auto put = [&](int32_t token, int32_t lane, int32_t position) {
        rows->tokens[row] = token, rows->lanes[row] = lane, rows->positions[row] = position;
        ++row;
    };
    for (int i = 0; i < documents; ++i) {
        const int document = active[i], steps = search->steps[document];
        const int32_t* lanes = search->lanes + document * search->most_beams;
        rows->firsts[i] = row;
        for (int b = 0; b < search->beams[document]; ++b)
            put(search->tokens[lanes[b] * search->stride + steps], lanes[b], steps);
        for (int d = 0; drafted && d < drafted[i]; ++d) {
            const int32_t token = drafts[i * most_drafts + d];
            search->tokens[lanes[0] * search->stride + steps + 1 + d] = token;
            put(token, lanes[0], steps + 1 + d);
        }
        rows->counts[i] = row - rows->firsts[i];
    }
    return row;
}

// Choose the tokens that follow. logits: (rows, vocabulary) float32, changed in place. Gives for each
// document how many tokens were made and whether it is done.
void t5_choose(const Search* search, const Rows* rows, int documents, const int32_t* active,
               int row_count, float* logits, int32_t* chosen, int32_t* made, uint8_t* done) {
    const int64_t vocabulary = search->vocabulary;
    static thread_local std::vector<int32_t> owner;
    owner.resize(row_count);
    for (int i = 0; i < documents; ++i)
        std::fill_n(owner.begin() + rows->firsts[i], rows->counts[i], active[i]);
    const int32_t* owners = owner.data();
    static thread_local std::vector<std::vector<Candidate>> found;  // by row, of beam search
    if (found.size() < size_t(row_count)) found.resize(row_count);
    auto* candidates = found.data();
#pragma omp parallel for schedule(dynamic, 1)
    for (int row = 0; row < row_count; ++row) {
        const int document = owners[row];
        float* scores = logits + row * vocabulary;
        const bool beams = search->beams[document] > 1;
        if (beams) log_softmax(scores, vocabulary);
        process(*search, document, search->tokens + rows->lanes[row] * search->stride,
                rows->positions[row] + 1, scores);
        if (beams)
            best_of(scores, vocabulary, search->scores[rows->lanes[row]], row,
                    2 * search->beams[document], candidates[row]);
        else
            chosen[row] = likeliest(scores, vocabulary);
    }
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < documents; ++i) {
        const int document = active[i], first = rows->firsts[i], beams = search->beams[document];
        if (beams == 1) {
            greedy(*search, document, chosen + first, rows->counts[i], made + i, done + i);
            continue;
        }
        static thread_local BeamRoom room;
        room.candidates.clear();
        for (int row = first; row < first + beams; ++row)
            for (Candidate candidate : candidates[row]) {
                candidate.beam -= first;
                room.candidates.push_back(candidate);
            }
        made[i] = 1;
        done[i] = beam(*search, document, room);
    }
}

// Propose what follows `tokens` by looking it up: the longest run of up to `longest` last tokens
// that stands in `source`, or earlier in `tokens`, and what came behind it there (Saxena 2023,
// "Prompt Lookup Decoding"). Returns how many tokens, up to `wanted`; `run` is the run's length.
int t5_propose(const int32_t* source, int source_count, const int32_t* tokens, int count,
               int longest, int wanted, int32_t* to, int32_t* run) {
    int best = 0, made = 0;
    const auto look = [&](const int32_t* text, int text_count) {
        // Backwards: of runs equally long the latest counts.
        for (int end = text_count - 1; end >= 1 && best < longest; --end) {
            int length = 0;
            while (length < longest && length < end && length < count &&
                   text[end - 1 - length] == tokens[count - 1 - length])
                ++length;
            if (length <= best) continue;
            best = length;
            made = std::min(wanted, text_count - end);
            std::copy_n(text + end, made, to);
        }
    };
    look(source, source_count);
    look(tokens, count);
    *run = best;
    return made;
}

}  // extern "C"
