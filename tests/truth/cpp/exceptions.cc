// Exceptions through frames that touch: in a destructor on the way, in the handler, and where nothing was thrown.
#include <memory>
#include <stdexcept>
#include <string>

#include "../truth.h"

namespace {

struct share shares[] = {{"Unwound::~Unwound", 128 * MIB, 0}, {"in_the_handler", 192 * MIB, 0}, {"not_thrown", 96 * MIB, 0}};
unsigned state = 13;

void touch_piece(struct share &share) __attribute__((always_inline));
inline void touch_piece(struct share &share) {
    size_t bytes = next_piece(&share, &state);
    if (!bytes)
        return;
    char *memory = fresh(bytes);
    dirty(memory, bytes);
    munmap(memory, bytes);
}

} // namespace

// Outside of the namespace: names that nobody may change.
struct Unwound {
    std::string held;
    NOINLINE ~Unwound() {
        touch_piece(shares[0]);
        STAY(held.data());
    }
};

NOINLINE void in_the_handler(const std::exception &error) {
    touch_piece(shares[1]);
    STAY(error.what());
}

template <typename Thing> NOINLINE void not_thrown(const Thing &thing) {
    touch_piece(shares[2]);
    STAY(&thing);
}

NOINLINE int thrower(int depth) {
    Unwound unwound{std::string(40, 'x')};
    if (depth == 0)
        throw std::runtime_error("as planned");
    return thrower(depth - 1) + 1;
}

NOINLINE int catcher() {
    try {
        return thrower(8);
    } catch (const std::exception &error) {
        in_the_handler(error);
        try {
            throw;
        } catch (const std::runtime_error &again) {
            in_the_handler(again);
        }
        return 0;
    }
}

int main() {
    for (auto &share : shares)
        share.want = scaled(share.want);
    auto left = [] {
        for (const auto &share : shares)
            if (share.done < share.want)
                return true;
        return false;
    };
    while (left()) {
        catcher();
        not_thrown(std::make_pair(1, std::string("two")));
    }
    tell("exceptions", shares, 3);
}
