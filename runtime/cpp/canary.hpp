/// Canaries: inputs whose answers are known, by which a machine finds out whether what it runs is still the model. As
/// in runtime/canary.py, which says why.
#pragma once

#include <string>

#include "bundle.hpp"
#include "session.hpp"

namespace derainer {

/// Have a session answer the canaries of its bundle whose sizes it takes, each twice. That it did is kept in a file
/// beside the bundle, for its file in the bundle and its `identity`, and a session without one is asked every time.
/// `when`: "first", "always" or "never". Throws CanaryError where an answer is further from the known one than rounding
/// explains, MismatchError for a broken file, InputError for another `when`, and what running an image does.
void check_canaries(Session& session, const Bundle& bundle, const std::string& when);

}  // namespace derainer
