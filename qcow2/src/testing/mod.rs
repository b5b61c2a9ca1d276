//! A simulated disk and a world to drive the engine in, for tests.
//!
//! The engine meets the same events here as in the server, in an order that a seed chooses.

mod disk;
mod prng;
mod world;

pub use disk::{Disk, SECTOR};
pub use prng::Prng;
pub use world::World;
