//! The checker against a second implementation: on images of many kinds that `qemu-img` made, and
//! on the same images broken in a thousand ways, `qemu-img check` must count what we count. Then
//! random damage, which must never make it panic, and its speed.
//!
//! `CHECK_CASES=n` and `CHECK_SEED=n` in the environment ask for more, or other, broken images.

#![expect(clippy::unwrap_used, reason = "a test may end so")]

mod agree;
mod crash;
mod damage;
mod dice;
mod images;
mod repair;
mod resize;
mod verdict;
