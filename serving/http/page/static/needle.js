// A long text about nothing in particular, with one fact that a question asks for.

const WHO = ["The gardener", "A clerk", "The night train", "Her neighbour", "The old bridge", "A flock of geese", "The baker", "The museum"];
const DID = ["waited for the rain to end", "crossed the square before noon", "kept a record of every visitor", "was painted twice in ten years", "stood beside the river", "left earlier than usual", "counted the boats", "changed its plans in spring"];
const WHY = ["because the road was closed", "although nobody had asked", "as it did every Thursday", "while the bells were ringing", "after a long winter", "for reasons that were never written down"];

export function needleText(sentences = 84) {
  const lines = [];
  for (let index = 0; index < sentences; index++) {
    const who = WHO[(index * 5) % WHO.length], did = DID[(index * 3 + (index >> 3)) % DID.length], why = WHY[(index * 7 + (index >> 2)) % WHY.length];
    lines.push(`${who} ${did} ${why}.`);
    if (index === Math.floor(sentences * 0.6)) lines.push("The secret code of the archive is 7294.");
  }
  return `${lines.join(" ")}\n\nWhat is the secret code of the archive?`;
}
